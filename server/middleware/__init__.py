"""What wraps the application: request ids, the access log, keys, limits of bodies."""

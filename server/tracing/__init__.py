"""OpenTelemetry traces. What imports its SDK is imported only where --otlp-traces-endpoint is given."""

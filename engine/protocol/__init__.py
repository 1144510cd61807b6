"""Messages, configuration and sockets: all that the server knows of the engine. Never imports torch."""

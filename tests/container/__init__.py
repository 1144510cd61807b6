"""The image, built from the Dockerfile and run for real: `make test-container`."""

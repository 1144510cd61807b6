"""The suite: unit, integration, e2e, fault and architecture tests."""

"""The API's types: what requests may say, and what responses look like."""

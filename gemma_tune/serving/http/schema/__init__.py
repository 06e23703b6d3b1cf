"""The bodies of requests and replies, checked and documented by pydantic."""

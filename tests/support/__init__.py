"""What the tests stand on: servers, databases, poolers, waiting. No tests are here."""

"""Charts and the report's page."""

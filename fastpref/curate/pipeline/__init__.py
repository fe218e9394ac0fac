"""The pipeline behind `fastpref curate`: stages, their configuration, the state between them, the report."""

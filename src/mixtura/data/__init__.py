"""Real data by name, and honest synthesizers where none can be shipped."""

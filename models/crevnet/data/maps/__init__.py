"""What is computed from the days of a city, and cached: road maps, static inputs and mean frames."""

"""Road maps, static inputs and mean frames, which are computed from the days of a city and cached."""

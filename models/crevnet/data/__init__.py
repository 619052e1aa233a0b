"""Data: Traffic4cast's day files and their road maps, videos, synthetic cities, and Moving MNIST. `city_data` gives what a run
reads."""

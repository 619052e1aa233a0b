"""What every room stands on: names of torch that change between releases, and tables in text. It knows no block."""

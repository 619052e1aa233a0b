"""The competitions of 2019 and 2021: their test cases, what a submission holds, and how it is scored."""

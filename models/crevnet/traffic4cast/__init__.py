"""The Traffic4cast competitions of 2019 and 2021: test cases, submissions and scores."""

"""The competitions of 2019 and 2021: test cases, submissions and scores."""

from crevnet.competition.challenge2019 import Challenge2019 as Challenge2019
from crevnet.competition.challenge2021 import Challenge2021 as Challenge2021
from crevnet.competition.challenge2021 import Task as Task
from crevnet.competition.interface import Case as Case
from crevnet.competition.interface import CaseFile as CaseFile
from crevnet.competition.interface import Challenge as Challenge
from crevnet.competition.settings import ChallengeSettings as ChallengeSettings
from crevnet.competition.settings import challenge as challenge

"""The competitions of 2019 and 2021: their test cases, what a submission holds, and how it is scored."""

from crevnet.competition.interface import Case as Case
from crevnet.competition.interface import CaseFile as CaseFile
from crevnet.competition.interface import Competition as Competition
from crevnet.competition.settings import CompetitionSettings as CompetitionSettings
from crevnet.competition.settings import competition as competition
from crevnet.competition.traffic4cast2019 import Traffic4cast2019 as Traffic4cast2019
from crevnet.competition.traffic4cast2021 import Task as Task
from crevnet.competition.traffic4cast2021 import Traffic4cast2021 as Traffic4cast2021

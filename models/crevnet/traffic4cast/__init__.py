"""The competitions of 2019 and 2021: their test cases, what a submission holds, and how it is scored."""

from crevnet.traffic4cast.challenge2019 import Challenge2019 as Challenge2019
from crevnet.traffic4cast.challenge2021 import Challenge2021 as Challenge2021
from crevnet.traffic4cast.challenge2021 import Task as Task
from crevnet.traffic4cast.interface import Case as Case
from crevnet.traffic4cast.interface import CaseFile as CaseFile
from crevnet.traffic4cast.interface import Challenge as Challenge

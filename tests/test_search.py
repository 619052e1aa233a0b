"""The site's search finds the field's words: each query has its page among the first two results.

The ranking is that of Material's search (lunr without stemming or length normalization; every word is also a prefix), on the
index that the build writes.
"""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUERIES = {
    "gradient checkpointing": "which-when",
    "activation checkpointing": "which-when",
    "activation recomputation": "index",
    "offloading": "which-when",
    "FSDP": "distributed",
    "DDP": "distributed",
    "multi-GPU": "distributed",
    "out of memory": "faq",
    "nvidia-smi": "faq",
    "BatchNorm": "faq",
    "dropout": "faq",
    "gradient accumulation": "faq",
    "torch.compile": "faq",
    "pretrained weights": "faq",
    "double backward": "faq",
    "odd number of channels": "faq",
    "changed its input in place": "faq",
    "cannot be differentiated twice": "faq",
    "ReconstructionError": "faq",
    "LSTM": "recurrence",
    "backpropagation through time": "recurrence",
    "bf16": "exact",
    "mixed precision": "exact",
    "bit-identical gradients": "exact",
    "numerical drift": "exact",
    "RevNet": "blocks",
    "i-RevNet": "blocks",
    "NICE": "blocks",
    "RealNVP": "blocks",
    "normalizing flow": "blocks",
    "log determinant": "blocks",
    "invertible network": "index",
    "mixture of experts": "blocks",
    "transformer": "get-started",
    "ResNet": "get-started",
    "Reformer": "get-started",
    "memory budget": "memory",
    "largest batch": "memory",
    "memcnn": "coming-from",
    "revlib": "coming-from",
    "custom coupling": "extending",
    "Traffic4cast": "traffic4cast",
    "ConvLSTM": "crevnet",
    "Moving MNIST": "moving-mnist",
    "resume training": "training",
    "learning curves": "figures",
    "quickstart": "get-started",
    "command line options": "cli",
    "Hugging Face": "faq",
    "reproducibility": "exact",
    "cite": "citation",
}

# lunr's, which are not in the index.
STOP_WORDS = """
    a able about across after all almost also am among an and any are as at be because been but by can cannot could dear did
    do does either else ever every for from get got had has have he her hers him his how however i if in into is it its just
    least let like likely may me might most must my neither no nor not of off often on only or other our own rather said say
    says she should since so some than that the their them then there these they this tis to too twas us wants was we were
    what when where which while who whom why will with would yet you your
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    site = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site)))
    return Index(json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8")))


class Index:
    def __init__(self, stored):
        self.separator = re.compile(stored["config"]["separator"])
        boosts = {name: field["boost"] for name, field in stored["config"]["fields"].items()}
        stop_words = set(STOP_WORDS.split())
        self.postings = defaultdict(list)  # of a token: section, times it occurs in a field, the field's boost
        for section in stored["docs"]:
            for field in ("title", "text"):
                for token, times in Counter(self.tokens(section.get(field, ""))).items():
                    if token not in stop_words:
                        boost = boosts[field] * section.get("boost", 1)
                        self.postings[token].append((section["location"], times, boost))
        self.sections = len(stored["docs"])

    def tokens(self, text):
        return [token.lower() for token in self.separator.split(re.sub(r"<[^>]+>", " ", text)) if token]

    def pages(self, query):
        """In the order of their best sections."""
        terms = self.tokens(query)
        scores, matched = defaultdict(float), defaultdict(set)
        for token, postings in self.postings.items():
            for term in filter(token.startswith, terms):
                inverse_frequency = math.log(1 + abs((self.sections - len(postings) + 0.5) / (len(postings) + 0.5)))
                for location, times, boost in postings:
                    scores[location] += inverse_frequency * 2.2 * times / (1.2 + times) * boost
                    matched[location].add(term)
        for location in scores:
            share = ("#" not in location) + len(matched[location]) / len(set(terms))
            scores[location] *= 1 + share**2
        ranked = sorted(scores, key=lambda location: -scores[location])
        return [*dict.fromkeys(re.sub(r"\.html.*", "", location) for location in ranked)]


def test_there_are_forty_queries_or_more():
    assert len(QUERIES) >= 40


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_finds_its_page_first_or_second(index, query):
    assert QUERIES[query] in index.pages(query)[:2]

"""The graphs of a compiled training step, and its gradients."""

import torch
from torch._dynamo.backends.common import aot_autograd

from engine.nets import weighted


class Graphs:
    """A backend that runs graphs as they are, and stores them: those of forward and of backward passes."""

    def __init__(self):
        self.forward, self.backward = [], []
        self._run = aot_autograd(fw_compiler=self._store(self.forward), bw_compiler=self._store(self.backward))

    def __call__(self, graph, inputs):
        return self._run(graph, inputs)

    def _store(self, graphs):
        def store(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return store

    @property
    def regions(self):
        """The calls of groups of blocks in the forward and in the backward graphs, by the name of the function they call."""
        return [
            [node.args[1] for graph in graphs for node in graph.graph.nodes if "invoke_subgraph" in str(node.target)]
            for graphs in (self.forward, self.backward)
        ]

    @property
    def recompute(self):
        """Whether the backward graphs invert as many groups of blocks as the forward graphs contain."""
        forward, backward = self.regions
        return 0 < len(forward) == len(backward)


def gradients(run, x, module, **context):
    """The output, and gradients of the input, of tensors among the keyword arguments, and of the parameters."""
    result = run(x, **context)
    loss = weighted(result) if torch.is_tensor(result) else weighted(result[0]) + result[1].square().sum()
    tensors = [t for t in context.values() if torch.is_tensor(t) and t.requires_grad]
    wanted = [x, *tensors, *[p for p in module.parameters() if p.requires_grad]]
    return [*(result if isinstance(result, tuple) else [result]), *torch.autograd.grad(loss, wanted, allow_unused=True)]

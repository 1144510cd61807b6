"""The same metrics under vLLM's names, for what reads those.

That is first the endpoint picker of Kubernetes' gateway API inference extension, by its model server protocol
(https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol), and
dashboards.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from server.metrics.exposition import Shown
from server.metrics.series import Family, Series, Value
from server.metrics.table import LORA_REQUESTS, METRICS

ENGINE = {"engine": "0"}  # vLLM's number of an engine, of which there is one here


def under_vllm_names(families: Mapping[str, Family[Series]], labels: Mapping[str, str]) -> Iterator[Shown]:
    """Return what is shown beside `families`, which are by our names; `labels` are those of every series."""
    by_name: dict[str, list[Family[Series]]] = defaultdict(list)
    for line in METRICS:
        for name in line.vllm:
            by_name[name].append(families[line.name])
    for name, parts in by_name.items():
        yield Shown(parts[0] if len(parts) == 1 else _sum_of(parts), name, {**labels, **ENGINE})
    yield Shown(_no_adapters(), LORA_REQUESTS.name, {})


def _sum_of(parts: Sequence[Family[Series]]) -> Family[Series]:
    """Return a gauge that is the sum of several."""
    series = [part.labels() for part in parts]
    family = Family(parts[0].metric, Value)
    family.labels().set_function(lambda: sum(one.read()[0] for one in series))
    return family


def _no_adapters() -> Family[Series]:
    """Return what says that there are no adapters; without it the picker logs an error at each look."""
    family = Family(LORA_REQUESTS, Value)
    for _, series in family:
        series.set_function(time.time)
    return family

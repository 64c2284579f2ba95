"""The deployments that tests run with: a server, for most beside a stock one that is compared with. In order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from _http import Endpoint
from _servers import RunningServer, ServerSpec

from kunserve_sgl.tiny_model_spec import TinyModelSpec
from long_run.ending_model import write_ending_model
from servers.command import STOCK_SERVER

KV_TOKENS = 8192
CONTEXT_TOKENS = 4096
BASE_TOKENS = 2048
RESERVE_FRAMES = 512
AUTO_BASE_TOKENS = 1024
AUTO_MIN_STAY_S = 1.0
AUTO_COOL_DOWN_S = 2.0
SAFEGUARDS_BASE_TOKENS = 1024
SAFEGUARDS_TIMEOUT_S = 10.0  # of a phase of a transition
# Of those in which processes are killed and stopped in each phase: longer than a phase takes on a busy machine.
FAULTS_ORDER_TIMEOUT_S = 8.0
FAULTS_PHASE_TIMEOUT_S = 8.0
FAULTS_DRAIN_TIMEOUT_S = 12.0
_REPLICAS = ("--dp-size", "2", "--kunserve", "manual")
# A random model would fill the places where JSON may have white space with it for ever.
_COMMON = ("--max-running-requests", "32", "--enable-metrics", "--constrained-json-disable-any-whitespace")
_BY_MESSAGE = ("--kunserve-remote-attention", "message")  # others map the KV that lies elsewhere
_OTHER_MACHINE = (2,)  # that of the last of three: the others map each other's memory, and use its by messages
# With auto KV moves where that pays, as measured: on a busy machine by chance, and the plan is another one then.
_NO_EXCHANGE = ("--kunserve-exchange", "off")
_NOBODY_COMES_BACK = ("--kunserve-restart", "off")  # where a test is about those who are left
_COMPARED = (
    *("--max-total-tokens", str(KV_TOKENS), "--context-length", str(CONTEXT_TOKENS)),
    *("--enable-custom-logit-processor", *_COMMON),
)
_MERGING = ("--max-total-tokens", str(BASE_TOKENS), "--context-length", "1024", *_COMMON)


@dataclass(frozen=True)
class Deployment:
    """A server, and the stock server with the same model that it is compared with, if any."""

    name: str
    ours: ServerSpec
    stock: ServerSpec | None = None

    @property
    def servers(self) -> tuple[ServerSpec, ...]:
        """All that run for a test of this deployment."""
        return (self.ours,) if self.stock is None else (self.ours, self.stock)


@dataclass(frozen=True)
class Pair:
    """The running servers of a deployment that is compared with stock."""

    stock_server: RunningServer
    server: RunningServer

    @property
    def stock(self) -> Endpoint:
        return self.stock_server.endpoint

    @property
    def ours(self) -> Endpoint:
        return self.server.endpoint

    @property
    def dtype(self) -> str:
        spec = self.server.spec.model
        assert isinstance(spec, TinyModelSpec)
        return spec.dtype

    @property
    def model(self) -> Path:
        return self.server.model

    @property
    def both(self) -> tuple[Endpoint, Endpoint]:
        return self.stock, self.ours

    def flush_caches(self) -> None:
        """Bring the caches of both servers into the same state: empty."""
        for endpoint in self.both:
            endpoint.flush_cache()


def _stock(dtype: str) -> ServerSpec:
    # Without --sleep-on-idle stock servers fill a core each while the other server is tested. It changes no answer.
    flags = ("--dp-size", "1", "--sleep-on-idle", *_COMPARED)
    return ServerSpec(flags, TinyModelSpec(dtype=dtype), STOCK_SERVER, memory_checks=False)


def _compared(*flags: str, dtype: str = "float32") -> ServerSpec:
    return ServerSpec((*flags, *_COMPARED), TinyModelSpec(dtype=dtype), memory_checks=False)


def _merging(*flags: str, arch: str = "llama", layers: int = 4, random_cuts: bool = True) -> ServerSpec:
    model = TinyModelSpec(arch=arch, layers=layers, dtype="float32")
    return ServerSpec((*_NO_EXCHANGE, *flags, "--kunserve", "manual", *_MERGING), model, random_cuts=random_cuts)


_LLAMA = _merging(
    *("--dp-size", "2", "--chunked-prefill-size", "64", "--kunserve-reserve-frames", str(RESERVE_FRAMES)),
    random_cuts=False,
)
FLOAT32 = Deployment("float32", _compared(*_REPLICAS, *_NO_EXCHANGE), _stock("float32"))
BFLOAT16 = Deployment("bfloat16", _compared(*_REPLICAS, dtype="bfloat16"), _stock("bfloat16"))
OFF = Deployment("off", _compared("--kunserve", "off", "--tp-size", "2", "--sleep-on-idle"), _stock("float32"))
TENSOR_PARALLEL = Deployment("tp2-dp2", _compared("--tp-size", "2", *_REPLICAS), _stock("float32"))
RANKS_AND_PAGES = Deployment(
    "tp2-pages",
    ServerSpec(
        (
            *("--tp-size", "2", "--kunserve", "manual", "--page-size", "16", "--chunked-prefill-size", "256"),
            *("--kunserve-reserve-frames", str(RESERVE_FRAMES), *_MERGING),
        )
    ),
    _stock("float32"),
)
LLAMA_AND_STOCK = Deployment("llama-2-and-stock", _LLAMA, _stock("float32"))
LLAMA = Deployment("llama-2", _LLAMA)
QWEN = Deployment("qwen3-4", _merging("--dp-size", "4", "--chunked-prefill-size", "256", arch="qwen3"))
MOE = Deployment(
    "glm4_moe-3",
    _merging(
        *("--dp-size", "3", "--chunked-prefill-size", "128", "--enable-mixed-chunk"),
        *("--kunserve-activations", "collective"),
        arch="glm4_moe",
        layers=5,
    ),
)
LATENT = Deployment(
    "deepseek_v2-2",
    _merging(
        *("--dp-size", "2", "--page-size", "16", "--chunked-prefill-size", "128"),
        *("--load-balance-method", "round_robin"),
        *_BY_MESSAGE,
        arch="deepseek_v2",
    ),
)
RANKS = Deployment(
    "llama-2-tp2",
    _merging(
        *("--dp-size", "2", "--tp-size", "2", "--chunked-prefill-size", "128", "--kunserve-control", "tcp"),
        *_BY_MESSAGE,
    ),
)
SAFEGUARDS = Deployment(
    "safeguards",
    ServerSpec(
        (
            *(*_REPLICAS, "--max-total-tokens", str(SAFEGUARDS_BASE_TOKENS), *_COMMON),
            *("--context-length", "4096", "--kunserve-host-copy"),  # longer than what one replica has room for
            *("--kunserve-transition-timeout", str(SAFEGUARDS_TIMEOUT_S), *_NO_EXCHANGE),
            *("--kunserve-order-timeout", "20"),  # who has work and runs no batch for so long is stalled
            *_NOBODY_COMES_BACK,
        ),
        admin_key="only-for-this-test",
        sabotaged=True,
    ),
)
RANKS_3 = Deployment(
    "llama-3-tp2",
    ServerSpec(
        (
            *("--dp-size", "3", "--tp-size", "2", "--kunserve", "manual", *_NO_EXCHANGE, *_BY_MESSAGE),
            *("--max-total-tokens", str(KV_TOKENS), "--context-length", str(KV_TOKENS), *_COMMON),
        )
    ),
)
TCP = Deployment("tcp", _merging("--dp-size", "2", "--kunserve-control", "tcp", random_cuts=False))
THREE_TO_LOSE = Deployment(
    "three-to-lose",
    ServerSpec(
        (
            *("--dp-size", "3", "--kunserve", "manual", "--max-total-tokens", "4096", "--max-running-requests", "8"),
            *(*_NO_EXCHANGE, *_NOBODY_COMES_BACK),
        ),
        memory_checks=False,
        sabotaged=True,
    ),
)
TO_LOSE = Deployment(
    "to-lose",
    ServerSpec(
        (
            *("--dp-size", "3", "--kunserve", "manual", "--max-total-tokens", str(KV_TOKENS)),
            *("--enable-return-hidden-states", *_COMMON, *_NO_EXCHANGE, *_NOBODY_COMES_BACK),
        ),
    ),
)
_FAULTS = (
    *("--chunked-prefill-size", "64", "--kunserve-order-timeout", str(FAULTS_ORDER_TIMEOUT_S)),
    *("--kunserve-reserve-frames", "128"),  # a layer host that keeps all of its own layers has room for others' KV
    *("--kunserve-transition-timeout", str(FAULTS_PHASE_TIMEOUT_S)),
    *("--kunserve-drain-timeout", str(FAULTS_DRAIN_TIMEOUT_S)),
    *("--kunserve-restart-tries", "1000", "--kunserve-restart-pause", "0.1"),  # who is killed has done nothing
)
FAULTS_2 = Deployment("faults-2", replace(_merging("--dp-size", "2", *_FAULTS), sabotaged=True))
FAULTS_3 = Deployment("faults-3", replace(_merging("--dp-size", "3", *_FAULTS), sabotaged=True))
FAULTS_BY_MESSAGE = Deployment(
    "faults-message-3", replace(_merging("--dp-size", "3", *_FAULTS, *_BY_MESSAGE), sabotaged=True)
)
FAULTS_BOTH_WAYS = Deployment(
    "faults-both-ways-3",
    replace(_merging("--dp-size", "3", *_FAULTS), sabotaged=True, other_machine=_OTHER_MACHINE),
)
FAULTS_RANKS = Deployment("faults-tp2", replace(_merging("--dp-size", "2", "--tp-size", "2", *_FAULTS), sabotaged=True))
AUTO = Deployment(
    "auto",
    ServerSpec(
        (
            *("--dp-size", "2", "--kunserve", "auto", "--kunserve-min-stay", str(AUTO_MIN_STAY_S)),
            *("--kunserve-cool-down", str(AUTO_COOL_DOWN_S), "--tool-call-parser", "qwen25"),
            # More than merged replicas have memory for: what SGLang fills in as a limit is then all of that.
            *("--max-total-tokens", str(AUTO_BASE_TOKENS), "--context-length", str(4 * AUTO_BASE_TOKENS), *_COMMON),
        ),
        write_ending_model,
    ),
)
LEND_BASE_TOKENS = 2048
AUTO_BY_MESSAGE = Deployment(
    "auto-message-3",
    ServerSpec(
        (
            *("--dp-size", "3", "--kunserve", "auto", "--kunserve-min-stay", str(AUTO_MIN_STAY_S)),
            *("--kunserve-cool-down", str(AUTO_COOL_DOWN_S), "--max-total-tokens", str(LEND_BASE_TOKENS)),
            *("--context-length", str(4 * LEND_BASE_TOKENS), *_COMMON, *_BY_MESSAGE),
        ),
    ),
)
_EXCHANGE = ("--chunked-prefill-size", "64", "--kunserve-exchange", "on", "--kunserve-transition-timeout", "15")
EXCHANGE = Deployment(
    "exchange",
    replace(_merging("--dp-size", "3", *_EXCHANGE, *_BY_MESSAGE, *_NOBODY_COMES_BACK), sabotaged=True),
)
BOTH_WAYS = Deployment(
    "both-ways",
    replace(
        _merging(
            *("--dp-size", "3", "--chunked-prefill-size", "64", "--kunserve-exchange", "on"),
            *("--kunserve-control", "tcp", "--kunserve-restart-pause", "0.1"),
        ),
        other_machine=_OTHER_MACHINE,
    ),
)
EXCHANGE_LATENT = Deployment(
    "exchange-latent", _merging("--dp-size", "2", "--page-size", "16", *_EXCHANGE, arch="deepseek_v2")
)
EXCHANGE_RANKS = Deployment("exchange-tp2", _merging("--dp-size", "2", "--tp-size", "2", *_EXCHANGE))
# What is saved counts for so long at least: much, so that KV moves by what batches take and not by how long they run.
EXCHANGE_AUTO = Deployment(
    "exchange-auto",
    _merging(
        *("--dp-size", "2", "--chunked-prefill-size", "64", "--kunserve-exchange", "auto", *_BY_MESSAGE),
        *("--kunserve-min-stay", "600"),
    ),
)
# Those that have a server in common follow each other, so that it goes on.
IN_ORDER = (
    *(BFLOAT16, FLOAT32, OFF, TENSOR_PARALLEL, RANKS_AND_PAGES, LLAMA_AND_STOCK, LLAMA),
    *(QWEN, MOE, LATENT, RANKS, RANKS_3, TCP, SAFEGUARDS, THREE_TO_LOSE, TO_LOSE),
    *(FAULTS_2, FAULTS_3, FAULTS_BY_MESSAGE, FAULTS_BOTH_WAYS, FAULTS_RANKS, AUTO, AUTO_BY_MESSAGE),
    *(EXCHANGE, BOTH_WAYS, EXCHANGE_LATENT, EXCHANGE_RANKS, EXCHANGE_AUTO),
)


def _groups() -> dict[Deployment, str]:
    """Names each with those before that it has a server in common with, by the first of them. Those that are compared
    with stock are one group, so that one process of a run only imports SGLang without our patches."""

    def has_in_common(one: Deployment, other: Deployment) -> bool:
        return bool(set(one.servers) & set(other.servers)) or None not in (one.stock, other.stock)

    groups: dict[Deployment, str] = {}
    for deployment in IN_ORDER:
        before = [each for each in groups if has_in_common(each, deployment)]
        groups[deployment] = groups[before[-1]] if before else deployment.name
    return groups


GROUPS = _groups()


def using(*deployments: Deployment) -> pytest.MarkDecorator:
    """Run a test, or all tests of a module, with the servers of each deployment.

    Tests of one deployment run one after the other, whatever module they are in, in the order of `IN_ORDER`.
    """
    return pytest.mark.parametrize(
        "deployment", deployments, indirect=True, ids=lambda deployment: deployment.name, scope="session"
    )


def deployment_of(item: pytest.Item) -> Deployment | None:
    """The deployment that a test is run with, if any."""
    callspec = getattr(item, "callspec", None)
    value = None if callspec is None else callspec.params.get("deployment")
    return value if isinstance(value, Deployment) else None

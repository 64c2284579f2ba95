"""The servers of the checks: models in the cache directory, flags for the device, and questions that are asked one at a
time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import requests

from gpu_checks.place import CheckError, Place
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import PRESETS, TinyModelSpec
from servers.command import KUNSERVE_SERVER, STOCK_SERVER, launch_command
from servers.server import ServerProcess, find_free_port
from servers.streams import Controls, Json

REPLICAS = 2
ALL = {"groups": [list(range(REPLICAS))]}
NO_GRAPHS = ("--cuda-graph-backend-decode", "disabled", "--disable-prefill-cuda-graph")
CONTEXT_TOKENS = 8192
_ASK_TIMEOUT_S = 60.0
_PROMPT_TOKENS = (3, 40, 170, 700)
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Model:
    """A model of the checks. One without weights is served with random ones of SGLang's."""

    spec: TinyModelSpec
    weights: bool = True

    @property
    def name(self) -> str:
        """Names its directory."""
        spec = self.spec
        return f"{spec.hidden}x{spec.layers}-{spec.dtype}{'' if self.weights else '-dummy'}"


_LLAMA_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocab_size": 32768}


def medium(place: Place, dtype: str) -> Model:
    """For tokens; on a CPU a tiny one in float32."""
    if place.is_cuda:
        return Model(TinyModelSpec(dtype=dtype, **PRESETS["gpu"]))
    return Model(TinyModelSpec(dtype="float32", **PRESETS["tiny"]))


def large(place: Place) -> Model:
    """For speed: the shape of Llama-3.1-8B, with 32,768 words; on a CPU a tiny one in float32."""
    if place.is_cuda:
        return Model(TinyModelSpec(dtype="bfloat16", max_position=131072, **_LLAMA_8B), weights=False)
    return Model(TinyModelSpec(dtype="float32", **PRESETS["tiny"]), weights=False)


def model_flags(place: Place, model: Model) -> list[str]:
    """The flags that go with the model on any server: where it lies, which is made if it is missing, and the dtype."""
    directory = place.cache / "models" / model.name
    if not (directory / "config.json").exists():
        write_tiny_model(model.spec, directory, weights=model.weights)
    dummy = [] if model.weights else ["--load-format", "dummy"]
    return ["--model-path", str(directory), "--dtype", model.spec.dtype, *dummy]


def device_flags(place: Place) -> list[str]:
    """The flags of any server on the device. Memory is bounded by tokens: a share of the GPU's memory cannot be divided
    among servers that start at the same time."""
    if not place.is_cuda:
        return []
    return [
        *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--mem-fraction-static", "0.9"),
        *("--cuda-graph-max-bs-decode", "64", "--disable-prefill-cuda-graph"),
    ]


def replica_flags(place: Place) -> list[str]:
    """The flags that put the replicas of one of our servers on one GPU."""
    return ["--kunserve-replicas-per-gpu", str(REPLICAS)] if place.is_cuda else []


@contextmanager
def servers(
    place: Place, commands: Mapping[str, Sequence[str]], deadline_s: float
) -> Iterator[dict[str, ServerProcess]]:
    """Servers by name, started at the same time and stopped at the end of the block; each has its log in the output
    directory. `commands` are the module and the flags of each."""
    with ExitStack() as stack:
        found = {}
        for name, (module, *flags) in commands.items():
            port = find_free_port()
            command = launch_command(module, None, port, *flags)
            log_path = place.output / f"{name}.server.log"
            log_path.unlink(missing_ok=True)
            env = {"OMP_NUM_THREADS": "1"}
            found[name] = stack.enter_context(ServerProcess(command, port=port, env=env, log_path=log_path))
        for server in found.values():
            server.wait_healthy(deadline_s)
        yield found


def command_of(place: Place, model: Model, replicas: int, tokens: int, *flags: str, stock: bool = False) -> list[str]:
    """Module and flags of a server, ours with transitions by hand. `tokens` are the KV slots of each replica."""
    ours = [] if stock else ["--kunserve", "manual"]
    together = replica_flags(place) if replicas > 1 else []
    return [
        *(STOCK_SERVER if stock else KUNSERVE_SERVER, *model_flags(place, model), *device_flags(place), *together),
        *("--dp-size", str(replicas), "--max-total-tokens", str(tokens), "--max-running-requests", "64"),
        *("--context-length", str(CONTEXT_TOKENS), *ours, *flags),
    ]


def ready_controls(server: ServerProcess) -> Controls:
    """The control calls of a server, whose replicas have all reported."""
    controls = Controls(server.port, server.log_path)
    controls.wait_ready()
    return controls


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and the log probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def prompts(seed: int = 0) -> list[list[int]]:
    """The questions, as token ids, of several lengths."""
    chance = random.Random(seed)
    return [[chance.randrange(300, 2000) for _ in range(tokens)] for tokens in _PROMPT_TOKENS]


def ask(server: ServerProcess, prompt: Sequence[int], replica: int | None = None) -> Answer:
    """Ask one question, and wait for the answer.

    Raises:
        CheckError: there is none.
    """
    body: Json = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": _ANSWER_TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }
    if replica is not None:
        body["routed_dp_rank"] = replica
    answer = requests.post(f"{server.base_url}/generate", json=body, timeout=_ASK_TIMEOUT_S)
    if answer.status_code != requests.codes.ok:
        raise CheckError(f"/generate: {answer.status_code} {answer.text[:300]}")
    pairs = [(each[0], each[1]) for each in answer.json()["meta_info"]["output_token_logprobs"]]
    return Answer(tuple(token for _, token in pairs), tuple(logprob for logprob, _ in pairs))


def ask_all(server: ServerProcess, controls: Controls) -> dict[int, list[Answer]]:
    """What each replica answers to each question, asked one at a time; no prefix of one is cached for the next."""
    answers: dict[int, list[Answer]] = {}
    for replica in range(REPLICAS):
        controls.wait_idle()
        answers[replica] = [ask(server, prompt, replica) for prompt in prompts()]
    return answers


@dataclass(frozen=True)
class Agreement:
    """How much of the answers is the same: answers with the same tokens, of how many; the largest difference of the log
    probabilities, up to the first token that differs; and where that is."""

    equal: int
    answers: int
    worst: float
    first_difference: str = ""


def agreement(expected: Sequence[Answer], got: Sequence[Answer]) -> Agreement:
    """Compare answers to the same questions. The log probability of the first token that differs is compared too: two
    tokens that are as good as equally probable may change places."""
    equal, worst, first = 0, 0.0, ""
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        if len(one.tokens) != len(other.tokens):
            raise CheckError(f"answer {number} has {len(other.tokens)} tokens instead of {len(one.tokens)}")
        pairs = list(zip(one.tokens, other.tokens, strict=True))
        same = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
        equal += same == len(pairs)
        if same < len(pairs) and not first:
            first = f"answer {number} has token {other.tokens[same]} instead of {one.tokens[same]} at {same}"
        compared = list(zip(one.logprobs, other.logprobs, strict=True))[: same + 1]
        worst = max([worst, *(abs(a - b) for a, b in compared)])
    return Agreement(equal, len(expected), worst, first)


def require_same_tokens(what: str, found: Agreement) -> None:
    """Raises CheckError unless all tokens are the same."""
    if found.equal != found.answers:
        raise CheckError(
            f"{what}: {found.equal} of {found.answers} answers have the same tokens; {found.first_difference}"
        )


def require_near(what: str, found: Agreement, tolerance: float) -> None:
    """Raises CheckError where log probabilities differ by more than `tolerance`."""
    if not found.worst <= tolerance:
        raise CheckError(f"{what}: log probabilities differ by {found.worst:.3g}; accepted: {tolerance:g}")

"""Trace files, selection and scaling, generated bursts, and prompts: exact, reproducible, nothing lost in silence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workload.bursts import BurstSpec, LengthDistribution, generate_bursts
from workload.prompts import PromptBuilder, plain_token_ids
from workload.trace_files import TraceFormat, detect_format, read_trace
from workload.traces import ShapeOptions, Trace, TraceError, TraceRequest, busiest_window, shape

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:04.0319600,110,27
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
MOONCAKE_ROWS: list[dict[str, Any]] = [
    {"timestamp": 27000, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 30535, "input_length": 1400, "output_length": 26, "hash_ids": [46, 47, 2353]},
    {"timestamp": 30535, "input_length": 500, "output_length": 1, "hash_ids": [46]},
    {"timestamp": 31000, "input_length": 1100, "output_length": 3, "hash_ids": [46, 47]},
]


def mooncake_text(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def lengths(trace: Trace) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in trace.requests]


def arrivals(trace: Trace) -> list[float]:
    return [request.arrival_s for request in trace.requests]


class TestFiles:
    def test_azure(self, tmp_path: Path) -> None:
        trace = read_trace(written(tmp_path, AZURE))
        assert lengths(trace) == [(4808, 10), (3180, 8), (110, 27)]
        assert arrivals(trace) == pytest.approx([0.0, 0.052, 60.052], abs=1e-6)
        assert [request.line for request in trace.requests] == [2, 3, 4]
        assert trace.notes == ()

    def test_azure_2024_has_zones_and_six_digits(self, tmp_path: Path) -> None:
        rows = ["2024-05-10 00:00:00.009930+00:00,1,2", "2024-05-10 00:30:00Z,1,2", "2024-05-10 03:00:01+02:00,1,2"]
        trace = read_trace(written(tmp_path, "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])))
        assert arrivals(trace) == pytest.approx([0.0, 1799.99007, 3600.99007], abs=1e-6)

    def test_burstgpt_failed_requests_are_left_out_and_counted(self, tmp_path: Path) -> None:
        trace = read_trace(written(tmp_path, BURSTGPT))
        assert lengths(trace) == [(472, 18), (417, 276)]
        assert arrivals(trace) == [0.0, 113.0]
        assert trace.notes == ("1 of 3 rows left out: no token generated (failed requests)",)

    def test_mooncake(self, tmp_path: Path) -> None:
        trace = read_trace(written(tmp_path, mooncake_text(MOONCAKE_ROWS)))
        assert lengths(trace) == [(1200, 52), (1400, 26), (500, 1), (1100, 3)]
        assert arrivals(trace) == pytest.approx([0.0, 3.535, 3.535, 4.0])
        assert trace.requests[1].hash_ids == (46, 47, 2353)
        assert trace.requests[0].line == 1

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (AZURE, TraceFormat.AZURE),
            (BURSTGPT, TraceFormat.BURSTGPT),
            (mooncake_text(MOONCAKE_ROWS), TraceFormat.MOONCAKE),
            ("\ufeff" + AZURE.replace("\n", "\r\n"), TraceFormat.AZURE),
        ],
    )
    def test_format_is_seen_from_the_first_line(self, tmp_path: Path, text: str, expected: TraceFormat) -> None:
        path = written(tmp_path, text)
        assert detect_format(path) is expected
        assert len(read_trace(path).requests) >= 2

    @pytest.mark.parametrize("text", ["a,b,c\n1,2,3\n", '{"timestamp": 1}\n', "{]\n", "", "\n"])
    def test_unknown_format_says_what_is_accepted(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(TraceError, match=r"trace:1: .*") as error:
            detect_format(written(tmp_path, text))
        assert "JSON" in str(error.value)

    def test_given_format_is_checked_against_the_header(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"trace:1: a burstgpt trace needs the columns \['Timestamp', "):
            read_trace(written(tmp_path, AZURE), TraceFormat.BURSTGPT)

    def test_unreadable_file(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="cannot be read"):
            read_trace(tmp_path / "missing.csv")
        with pytest.raises(TraceError, match="cannot be read"):
            read_trace(tmp_path)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ("2023-11-16 18:17:05,12", "has 2 fields, the header has 3"),
            ("2023-11-16 18:17:05,12,3,4", "has 4 fields"),
            ("16.11.2023 18:17,12,3", "TIMESTAMP is '16.11.2023 18:17'; accepted is YYYY-MM-DD"),
            ("2023-13-16 18:17:05,12,3", "TIMESTAMP is '2023-13-16 18:17:05'"),
            ("2023-11-16 18:17:05,twelve,3", "ContextTokens is 'twelve'; accepted is a whole number"),
            ("2023-11-16 18:17:05,-12,3", "ContextTokens is '-12'"),
            ("2023-11-16 18:17:05,0,3", "ContextTokens is '0'; accepted is a whole number of tokens, at least 1"),
            ("2023-11-16 18:17:05,12,3.5", "GeneratedTokens is '3.5'"),
            ("2023-11-16 18:17:05,1_2,3", "ContextTokens is '1_2'"),
            ('2023-11-16 18:17:05,"12,3', "is not valid CSV"),
            ("2023-11-16 18:17:05,\x00,3", "CSV|ContextTokens"),
            ("", "has 0 fields"),
        ],
    )
    def test_malformed_csv_row_stops_with_its_line_or_is_counted(self, tmp_path: Path, row: str, reason: str) -> None:
        lines = AZURE.splitlines()
        path = written(tmp_path, "\n".join([*lines[:3], row, *lines[3:]]) + "\n")
        with pytest.raises(TraceError, match=r"trace:4: ") as error:
            read_trace(path)
        assert any(part in str(error.value) for part in reason.split("|"))
        trace = read_trace(path, skip_malformed=True)
        assert lengths(trace) == [(4808, 10), (3180, 8), (110, 27)]
        assert len(trace.notes) == 1
        assert "1 of 4 rows left out as malformed" in trace.notes[0]
        assert "trace:4: " in trace.notes[0]

    @pytest.mark.parametrize("stamp", ["", "x", "nan", "inf"])
    def test_malformed_burstgpt_time(self, tmp_path: Path, stamp: str) -> None:
        path = written(tmp_path, BURSTGPT + f"{stamp},GPT-4,1,1,2,API log\n")
        with pytest.raises(TraceError, match=rf"trace:5: Timestamp is '{stamp}'"):
            read_trace(path)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ("not json", "is not valid JSON"),
            ("[1]", "is not a JSON object"),
            ('{"timestamp": 1, "input_length": 5, "output_length": 5}', "lacks hash_ids"),
            (json.dumps({**MOONCAKE_ROWS[0], "timestamp": "1"}), "timestamp is '1'"),
            (json.dumps({**MOONCAKE_ROWS[0], "timestamp": math.nan}), "timestamp is nan"),
            (json.dumps({**MOONCAKE_ROWS[0], "input_length": 0}), "input_length is 0"),
            (json.dumps({**MOONCAKE_ROWS[0], "output_length": True}), "output_length is True"),
            (json.dumps({**MOONCAKE_ROWS[0], "hash_ids": [1, -2, 3]}), "hash_ids is no list of whole numbers"),
            (json.dumps({**MOONCAKE_ROWS[0], "hash_ids": [1]}), "has 1 hash_ids for input_length 1200, which is 3 blo"),
            (json.dumps({**MOONCAKE_ROWS[0], "hash_ids": [1] * 75}), "--hash-block-tokens"),
        ],
    )
    def test_malformed_mooncake_row(self, tmp_path: Path, row: str, reason: str) -> None:
        path = written(tmp_path, mooncake_text(MOONCAKE_ROWS[:2]) + row + "\n" + mooncake_text(MOONCAKE_ROWS[2:]))
        with pytest.raises(TraceError, match=r"trace:3: ") as error:
            read_trace(path)
        assert reason in str(error.value)
        assert len(read_trace(path, skip_malformed=True).requests) == 4

    def test_block_size_of_the_hash_ids_can_be_set(self, tmp_path: Path) -> None:
        path = written(tmp_path, json.dumps({**MOONCAKE_ROWS[0], "hash_ids": list(range(75))}))
        assert read_trace(path, hash_block_tokens=16).hash_block_tokens == 16
        with pytest.raises(TraceError, match="hash_block_tokens is 0"):
            read_trace(path, hash_block_tokens=0)

    def test_rows_out_of_order_are_sorted_and_counted(self, tmp_path: Path) -> None:
        header, first, second, third = AZURE.splitlines()
        trace = read_trace(written(tmp_path, "\n".join([header, second, third, first])))
        assert lengths(trace) == [(4808, 10), (3180, 8), (110, 27)]
        assert trace.notes == ("1 rows were out of order and have been sorted",)
        assert lengths(shape(trace, ShapeOptions()))[0] == (4808, 10)

    def test_file_without_requests(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"holds no request to replay \(no row\)"):
            read_trace(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n"))
        with pytest.raises(TraceError, match="1 of 1 rows left out: no token generated"):
            read_trace(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,0\n"))


def made(*times_s: float) -> Trace:
    """A trace whose request i arrives at times_s[i] with 10 * (i + 1) prompt and i + 1 output tokens."""
    requests = (TraceRequest(time_s, 10 * (i + 1), i + 1, line=i + 2) for i, time_s in enumerate(times_s))
    return Trace("made", tuple(requests), ("kept",))


class TestShape:
    def test_window_is_half_open_and_starts_again_at_zero(self) -> None:
        shaped = shape(made(0, 5, 7.5, 10, 12), ShapeOptions(window_start_s=5, window_length_s=5))
        assert arrivals(shaped) == [0.0, 2.5]
        assert lengths(shaped) == [(20, 2), (30, 3)]
        assert shaped.notes == ("kept",)

    def test_empty_window_says_what_the_trace_has(self) -> None:
        with pytest.raises(TraceError, match=r"no request arrives in the window \[20, 25\) s; .* 2 requests in 3.0 s"):
            shape(made(0, 3), ShapeOptions(window_start_s=20, window_length_s=5))

    def test_scales(self) -> None:
        shaped = shape(made(1, 3), ShapeOptions(time_scale=0.25, prompt_scale=0.33, output_scale=0.1))
        assert arrivals(shaped) == [0.0, 0.5]
        assert lengths(shaped) == [(3, 1), (7, 1)]

    def test_upscale_then_limit(self) -> None:
        shaped = shape(made(0, 1, 2), ShapeOptions(upscale=3, limit=5))
        assert arrivals(shaped) == [0, 0, 0, 1, 1]
        assert [(request.line, request.copy) for request in shaped.requests] == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
        assert "4 of 9 requests left out by the limit" in shaped.notes

    def test_clamps_are_reported(self) -> None:
        shaped = shape(made(0, 1, 2), ShapeOptions(max_prompt_tokens=15, max_output_tokens=1))
        assert lengths(shaped) == [(10, 1), (15, 1), (15, 1)]
        assert shaped.notes == ("kept", "2 prompts cut to 15 tokens", "2 outputs cut to 1 tokens")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("window_start_s", -1.0),
            ("window_start_s", math.nan),
            ("window_length_s", 0.0),
            ("upscale", 0),
            ("limit", 0),
            ("time_scale", 0.0),
            ("prompt_scale", -1.0),
            ("output_scale", math.inf),
            ("max_prompt_tokens", 0),
            ("max_output_tokens", -1),
        ],
    )
    def test_unusable_option_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(TraceError, match=f"{name} is {value}; accepted is "):
            ShapeOptions(**{name: value})

    def test_busiest_window(self) -> None:
        trace = made(0, 1, 10, 11, 12, 20, 21, 21.5, 22.1, 40)
        start_s = busiest_window(trace, 2.0)
        assert start_s == 20
        assert len(shape(trace, ShapeOptions(start_s, 2.0)).requests) == 3
        assert busiest_window(trace, 3.0) == 20
        assert busiest_window(made(4), 1.0) == 4


def burst_spec(**changes: Any) -> BurstSpec:
    values: dict[str, Any] = {
        "base_rate": 2.0,
        "burst_rate": 30.0,
        "burst_start_s": 100.0,
        "burst_length_s": 50.0,
        "burst_gap_s": 100.0,
        "waves": 2,
        "prompt": LengthDistribution.parse("lognormal:200:0.5"),
        "output": LengthDistribution.parse("uniform:10:30"),
    }
    return BurstSpec(**{**values, **changes})


class TestBursts:
    def test_rates_are_as_asked(self) -> None:
        trace = generate_bursts(burst_spec(), seed=1)
        times = np.array(arrivals(trace))
        # Counts of a Poisson process: 5 standard deviations on either side, with the seed fixed.
        for begin_s, end_s, rate in [(0, 100, 2), (100, 150, 30), (150, 250, 2), (250, 300, 30), (300, 400, 2)]:
            count = int(((times >= begin_s) & (times < end_s)).sum())
            expected = rate * (end_s - begin_s)
            assert abs(count - expected) < 5 * math.sqrt(expected), (begin_s, count, expected)
        assert times.max() < 400
        assert (np.diff(times) >= 0).all()

    def test_gaps_are_exponential(self) -> None:
        spec = burst_spec(base_rate=10.0, burst_start_s=2000.0, waves=0)
        gaps = np.diff(arrivals(generate_bursts(spec, seed=3)))
        # An exponential distribution has its mean as its standard deviation, and P(gap > mean) = 1/e.
        assert gaps.mean() == pytest.approx(0.1, rel=0.03)
        assert gaps.std() == pytest.approx(0.1, rel=0.03)
        assert (gaps > 0.1).mean() == pytest.approx(math.exp(-1), abs=0.02)

    def test_lengths_follow_their_distributions(self) -> None:
        trace = generate_bursts(burst_spec(), seed=1)
        prompts = np.array([prompt for prompt, _ in lengths(trace)])
        outputs = np.array([output for _, output in lengths(trace)])
        assert np.median(prompts) == pytest.approx(200, rel=0.05)
        assert np.log(prompts).std() == pytest.approx(0.5, rel=0.05)
        assert (outputs.min(), outputs.max()) == (10, 30)
        assert outputs.mean() == pytest.approx(20, rel=0.03)

    def test_seed_decides(self) -> None:
        assert generate_bursts(burst_spec(), 7) == generate_bursts(burst_spec(), 7)
        assert arrivals(generate_bursts(burst_spec(), 7)) != arrivals(generate_bursts(burst_spec(), 8))

    def test_lengths_do_not_depend_on_the_other_lengths(self) -> None:
        changed = generate_bursts(burst_spec(output=LengthDistribution.parse("fixed:5")), 7)
        assert arrivals(changed) == arrivals(generate_bursts(burst_spec(), 7))
        assert {output for _, output in lengths(changed)} == {5}

    def test_nothing_to_replay(self) -> None:
        with pytest.raises(TraceError, match="holds no request"):
            generate_bursts(burst_spec(base_rate=0.0, burst_rate=0.0), 1)

    @pytest.mark.parametrize(
        "text",
        "|fixed|fixed:x|fixed:0|fixed:1.5|fixed:1:2|uniform:5:4|uniform:0:4|uniform:1:inf|lognormal:10"
        "|lognormal:10:-1|lognormal:0.5:1|normal:1:2".split("|"),
    )
    def test_unusable_distribution_is_named(self, text: str) -> None:
        with pytest.raises(TraceError, match="length distribution is ") as error:
            LengthDistribution.parse(text)
        assert repr(text) in str(error.value)

    @pytest.mark.parametrize("name", ["base_rate", "burst_rate", "burst_start_s", "burst_length_s", "burst_gap_s"])
    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_unusable_rate_or_time_is_named(self, name: str, value: float) -> None:
        with pytest.raises(TraceError, match=f"{name} is {value}"):
            burst_spec(**{name: value})
        with pytest.raises(TraceError, match="waves is -1"):
            burst_spec(waves=-1)


IDS = list(range(100, 1100))


def builder(seed: int = 1, block_tokens: float = 512, ids: Sequence[int] = IDS) -> PromptBuilder:
    return PromptBuilder(ids, seed, hash_block_tokens=block_tokens)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading elements."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class TestPrompts:
    def test_length_is_exact_and_ids_are_of_the_vocabulary(self) -> None:
        for tokens in (1, 2, 511, 512, 513, 5000):
            prompt = builder().build(TraceRequest(0.0, tokens, 1, line=2))
            assert len(prompt) == tokens
            assert set(prompt) <= set(IDS)
            assert all(type(token) is int for token in prompt)

    def test_each_request_copy_and_seed_has_its_own(self) -> None:
        first = TraceRequest(0.0, 64, 1, line=2)
        others = [TraceRequest(0.0, 64, 1, line=3), TraceRequest(0.0, 64, 1, line=2, copy=1)]
        starts = [tuple(builder().build(request)[:4]) for request in [first, *others]]
        starts.append(tuple(builder(seed=2).build(first)[:4]))
        assert len(set(starts)) == 4

    def test_same_in_every_process(self) -> None:
        code = "\n".join(
            [
                "from workload.prompts import PromptBuilder",
                "from workload.traces import TraceRequest",
                "builder = PromptBuilder(range(100, 1100), 1, hash_block_tokens=512)",
                "print(builder.build(TraceRequest(0.0, 40, 1, line=9)), builder.build("
                "TraceRequest(0.0, 600, 1, line=9, hash_ids=(5, 6)))[-9:])",
            ]
        )
        bench = Path(sys.modules[PromptBuilder.__module__].__file__ or "").parents[1]
        printed = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(bench)},
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            ).stdout
            for hash_seed in ("0", "1", "12345")
        }
        assert len(printed) == 1
        assert str(builder().build(TraceRequest(0.0, 40, 1, line=9))) in printed.pop()

    @pytest.mark.parametrize("scale", [1.0, 0.37, 0.01, 2.5])
    def test_prefixes_are_shared_as_the_hash_ids_say(self, tmp_path: Path, scale: float) -> None:
        recorded = read_trace(written(tmp_path, mooncake_text(MOONCAKE_ROWS)))
        trace = shape(recorded, ShapeOptions(prompt_scale=scale))
        made_by = builder(block_tokens=trace.hash_block_tokens)
        prompts = [made_by.build(request) for request in trace.requests]
        assert [len(prompt) for prompt in prompts] == [request.prompt_tokens for request in trace.requests]
        for i, first in enumerate(trace.requests):
            for j, second in enumerate(trace.requests[:i]):
                same_ids = common_prefix(first.hash_ids, second.hash_ids)
                same_tokens = common_prefix(prompts[i], prompts[j])
                whole = min(len(prompts[i]), len(prompts[j]))
                shared = min(round(same_ids * 512 * scale), whole)
                assert same_tokens >= shared
                # A few equal tokens after the last shared block are chance: 1 in 1000 each.
                assert same_tokens <= shared + 3 or same_tokens == whole == shared

    def test_tail_without_hash_id_is_the_requests_own(self, tmp_path: Path) -> None:
        rows = [{**MOONCAKE_ROWS[3], "timestamp": time_ms} for time_ms in (0, 1)]
        trace = read_trace(written(tmp_path, mooncake_text(rows)))
        first, second = (builder().build(request) for request in trace.requests)
        assert first[:1024] == second[:1024]
        assert first[1024:1040] != second[1024:1040]

    def test_copies_do_not_share_prefixes(self, tmp_path: Path) -> None:
        trace = shape(read_trace(written(tmp_path, mooncake_text(MOONCAKE_ROWS))), ShapeOptions(upscale=2))
        first, copied = (builder().build(request) for request in trace.requests[:2])
        assert first[:8] != copied[:8]

    def test_special_and_added_tokens_are_never_used(self) -> None:
        from tokenizers import AddedToken, Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), bos_token="<s>", eos_token="</s>"
        )
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])
        assert len(tokenizer) == 6
        assert plain_token_ids(tokenizer) == [2, 3, 4]

    def test_tokenizer_without_plain_tokens(self) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a")), bos_token="<s>"
        )
        with pytest.raises(TraceError, match="1 plain tokens"):
            plain_token_ids(tokenizer)

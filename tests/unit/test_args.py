"""The KunServe flags: modes, defaults, and the refusal of values that make no sense."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kunserve_sgl import args, flag_checks
from kunserve_sgl.args import Mode
from kunserve_sgl.errors import ConfigurationError


@pytest.mark.parametrize(
    ("requested", "replicas", "mode"),
    [
        (None, 1, Mode.OFF),
        (None, 2, Mode.AUTO),
        ("off", 4, Mode.OFF),
        ("manual", 1, Mode.MANUAL),
        ("auto", 2, Mode.AUTO),
    ],
)
def test_mode(requested: str | None, replicas: int, mode: Mode) -> None:
    assert args.resolve_mode(requested, replicas) is mode


def test_unknown_mode_names_flag_and_accepted_values() -> None:
    with pytest.raises(ConfigurationError, match=r"--kunserve 'on' is not known; accepted: off, manual, auto"):
        args.resolve_mode("on", 2)


def test_help_has_the_group() -> None:
    parser = argparse.ArgumentParser()
    args.add_kunserve_arguments(parser)
    assert "KunServe:" in parser.format_help()
    assert "--kunserve {off,manual,auto}" in parser.format_help()


def test_readme_has_the_table_of_flags() -> None:
    """`python -m kunserve_sgl.args` prints what belongs there."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{args.flag_table()}\n\n" in readme


def test_every_flag_says_what_its_default_is() -> None:
    for name, flag, default in args.flags():
        assert flag.is_switch or "Default: " in flag.described(default), name


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("kunserve_reserve_frames", -1, 0),
        ("kunserve_frame_bytes", 0, 1),
        ("kunserve_max_replicas", 2, 3),
        ("kunserve_max_slots", 0, 1),
    ],
)
def test_senseless_values_are_refused(field: str, value: int, least: int) -> None:
    options = vars(args.KunserveOptions())
    flag_checks.check_options(options, replicas=3)
    with pytest.raises(ConfigurationError, match=f"--{field.replace('_', '-')} {value}: accepted: {least} or more"):
        flag_checks.check_options({**options, field: value}, replicas=3)


@pytest.mark.parametrize("field", ["kunserve_transition_timeout", "kunserve_drain_timeout"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_senseless_timeouts_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"--{field.replace('_', '-')} {value}: accepted: seconds"):
        flag_checks.check_options({**vars(args.KunserveOptions()), field: value}, replicas=2)


@pytest.mark.parametrize(
    ("by", "control", "lacks_access", "way"),
    [("auto", "ipc", False, "map"), ("auto", "tcp", False, "map"), ("auto", "network", False, "auto")]
    + [("auto", "ipc", True, "auto"), ("map", "tcp", False, "map"), ("map", "ipc", True, "map")]
    + [("message", control, False, "message") for control in args.CONTROL_TRANSPORTS],
)
def test_auto_is_for_each_peer_only_where_not_all_can_be_mapped(
    by: str, control: str, lacks_access: bool, way: str
) -> None:
    options = args.KunserveOptions(
        kunserve_remote_attention=by, kunserve_control=control, kunserve_lacks_access=lacks_access
    )
    assert options.way_to_peers == way
    assert options.uses_messages is (way != "map")


def test_a_network_takes_what_needs_no_shared_machine() -> None:
    options = {
        **vars(args.KunserveOptions(kunserve_control="network", kunserve_remote_attention="message")),
        "use_ray": True,
    }
    flag_checks.check_options(options, replicas=2)
    for name, value, accepted in (
        ("use_ray", False, "--kunserve-control network: .*; accepted: with --use-ray"),
        ("kunserve_remote_attention", "map", "--kunserve-remote-attention map: .* network: auto, message"),
        ("kunserve_host_copy", True, "--kunserve-host-copy: .* not with --kunserve-control network"),
        ("kunserve_activations", "mapped", "mapped: with .* network activations are sent .*: auto, collective"),
    ):
        with pytest.raises(ConfigurationError, match=accepted):
            flag_checks.check_options({**options, name: value}, replicas=2)


def test_by_message_nothing_is_mapped() -> None:
    options = vars(args.KunserveOptions(kunserve_remote_attention="message"))
    flag_checks.check_options(options, replicas=2)
    for name, value, accepted in (
        ("kunserve_activations", "mapped", "mapped: with .* message activations are sent .*: auto, collective"),
        ("kunserve_replicas_per_gpu", 2, "--kunserve-replicas-per-gpu 2: .* message .*; accepted: 1"),
    ):
        with pytest.raises(ConfigurationError, match=accepted):
            flag_checks.check_options({**options, name: value}, replicas=2)
    assert args.resolve_activations(options) == "collective"
    mapped = {**options, "kunserve_remote_attention": "auto"}
    assert args.resolve_activations(mapped) == "auto"

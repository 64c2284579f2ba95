"""The HTTP routes of KunServe, added to SGLang's server: status, check, drop, restore, dry run, KV memory by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import AuthLevel, auth_level

from kunserve_sgl.control.answers import State, Verdict, waiting_status
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.launcher.calls import CHECK_DEADLINE_S, Calls
from kunserve_sgl.integration.launcher.request_bodies import (
    BodyTooLargeError,
    parse_check,
    parse_drop,
    parse_lend,
    parse_plan,
    parse_resize,
    parse_restore,
    read_body,
)
from kunserve_sgl.integration.messages import Command, Outcome, ReplicaReply

_HTTP_STATUS = {Outcome.DONE: 200, Outcome.BAD_REQUEST: 400, Outcome.CONFLICT: 409}
_HTTP_STATUS_OF_VERDICT = {Verdict.DONE: 200, Verdict.BAD_REQUEST: 400, Verdict.CONFLICT: 409, Verdict.FAILED: 503}


def add_routes(app: FastAPI) -> None:
    """Adds the routes to SGLang's application, one by one: SGLang looks up who may call a route among the
    application's own routes, and would not find the level of one that is inside an included router."""
    app.add_api_route("/kunserve/status", status, methods=["GET"])
    app.add_api_route("/kunserve/kv", resize_kv, methods=["POST"])
    app.add_api_route("/kunserve/plan", plan, methods=["POST"])
    app.add_api_route("/kunserve/drop", drop, methods=["POST"])
    app.add_api_route("/kunserve/restore", restore, methods=["POST"])
    app.add_api_route("/kunserve/lend", lend, methods=["POST"])
    app.add_api_route("/kunserve/check", check, methods=["POST"])


def _server_calls() -> Calls:
    """Returns the calls of this server's tokenizer manager, which exists only once the server is up."""
    calls: Calls = http_server.get_global_state().tokenizer_manager.calls
    return calls


def _error(status_code: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status_code)


def _refused_body(error: ValueError) -> JSONResponse:
    return _error(413 if isinstance(error, BodyTooLargeError) else 400, str(error))


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def status() -> JSONResponse:
    """Returns state and plan of the deployment; frames, slots and capacity of every replica that answers in time."""
    calls = _server_calls()
    try:
        deployment = await _deployment_status(calls)
        members = {member.pop("id"): member for member in deployment.pop("members")}
        alive = [replica for replica, member in members.items() if not member["lost"]]
    except TransientError as error:
        return _error(503, str(error))
    statuses = {reply.replica: reply.status for reply in await calls.ask_for_status(alive)}
    for replica in set(alive) - statuses.keys():
        silence = f"no answer within {calls.status_deadline_s:g} s" if replica in calls.alive else "it has just ended"
        members[replica]["reason"] = members[replica]["reason"] or silence
    replicas = [{"id": replica, **statuses.get(replica, {}), **member} for replica, member in members.items()]
    return JSONResponse({**deployment, "replicas": replicas})


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def check(request: Request) -> JSONResponse:
    """Says whether every replica that is there has what it should have, and what differs; 409 while a transition or
    another check is under way. An exchange of KV is none: it waits. Requests go on meanwhile."""
    calls = _server_calls()
    try:
        parse_check(await read_body(request))
    except ValueError as error:
        return _refused_body(error)
    try:
        async with calls.without_exchange():
            deployment = await _deployment_status(calls)
            alive = [member["id"] for member in deployment["members"] if not member["lost"]]
            replies = await calls.ask_for_check(alive)
            epochs = range(deployment["epoch"], (await _deployment_status(calls))["epoch"] + 1)
    except TransientError as error:
        return _error(503, str(error))
    for reply in replies.values():
        if reply is not None and reply.outcome is not Outcome.DONE:
            return _error(_HTTP_STATUS[reply.outcome], f"replica {reply.replica}: {reply.message}")
    replicas = [{"replica": replica, "differences": _differences(reply, epochs)} for replica, reply in replies.items()]
    return JSONResponse({"ok": not any(each["differences"] for each in replicas), "replicas": replicas})


def _differences(reply: ReplicaReply | None, epochs: range) -> list[str]:
    """Returns what a replica has said that differs. `epochs` are those of the plans that the coordinator has had
    meanwhile."""
    if reply is None:
        return [f"no answer within {CHECK_DEADLINE_S:g} s"]
    found: list[str] = list(reply.status["differences"])
    if reply.status["epoch"] not in epochs:
        found.append(f"its plan has epoch {reply.status['epoch']}; that of the coordinator has epoch {epochs[-1]}")
    return found


async def _deployment_status(calls: Calls) -> dict[str, Any]:
    if calls.replicas == 1:  # it has no controller, and no coordinator in it
        return waiting_status(1, missing=())
    return dict((await calls.ask_coordinator(Command.STATUS)).body)


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def plan(request: Request) -> JSONResponse:
    """Says what a drop would do: the body is that of /kunserve/drop; or what one of the others would, with "action":
    "restore" or "lend"."""
    return await _command(Command.PLAN, request)


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def drop(request: Request) -> JSONResponse:
    """Merges groups of replicas: {"groups": [[0, 1]]}, and optionally "layers" or "tokens"."""
    return await _command(Command.DROP, request)


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def restore(request: Request) -> JSONResponse:
    """Takes merged groups apart: {"groups": [[0, 1]]}, or all with an empty body; in part with "layers" or "tokens"."""
    return await _command(Command.RESTORE, request)


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def lend(request: Request) -> JSONResponse:
    """Lets a replica have KV slots in free memory of another: {"from": 1, "to": 0, "tokens": 4096}."""
    return await _command(Command.LEND, request)


_PARSERS = {Command.DROP: parse_drop, Command.RESTORE: parse_restore, Command.LEND: parse_lend}
_DRY_RUNS = {"drop": Command.PLAN, "restore": Command.PLAN_RESTORE, "lend": Command.PLAN_LEND}


async def _command(command: Command, request: Request) -> JSONResponse:
    calls = _server_calls()
    try:
        # What is wrong with the body itself is said first, also where there is nobody to merge with.
        body, replicas = await read_body(request), max(2, calls.replicas)
        if command is Command.PLAN:
            action, fields = parse_plan(body, replicas)
            command = _DRY_RUNS[action]
        else:
            fields = _PARSERS[command](body, replicas)
    except ValueError as error:
        return _refused_body(error)
    if calls.replicas == 1:
        return _error(409, "there is one replica, and layers are shared by two or more; start with --dp-size 2 or more")
    try:
        reply = await calls.ask_coordinator(command, **fields)
    except TransientError as error:
        return _error(503, str(error))
    content = reply.body
    if reply.verdict is not Verdict.DONE:
        content = {**content, "error": {"message": content["message"]}}
    return JSONResponse(content, status_code=_HTTP_STATUS_OF_VERDICT[reply.verdict])


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def resize_kv(request: Request) -> JSONResponse:
    """Gives frames to a replica's KV cache, or takes them: {"replica": 0, "frames": 16}."""
    calls = _server_calls()
    try:
        replica, frames = parse_resize(await read_body(request), calls.replicas)
    except ValueError as error:
        return _refused_body(error)
    try:
        members = (await _deployment_status(calls))["members"]
        if (state := members[replica]["state"]) != State.NORMAL.value:
            return _error(409, f"replica {replica} is {state}; its memory is resized while it is normal only")
        alive = [member["id"] for member in members if not member["lost"]]
        replies = await calls.ask_to_resize(alive, replica, frames)
    except TransientError as error:
        return _error(503, str(error))
    reply = next(reply for reply in replies if reply.replica == replica)
    if reply.outcome is not Outcome.DONE:
        return _error(_HTTP_STATUS[reply.outcome], reply.message)
    if replica == 0:  # SGLang's /server_info shows the first replica's capacity
        http_server.get_global_state().scheduler_info["max_total_num_tokens"] = reply.status["capacity_tokens"]
    return JSONResponse({"success": True, "message": reply.message, "replica": reply.status})

"""SGLang's tokenizer manager with the checks of what requests say, at the three places that all routes come through."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.responses import ORJSONResponse
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from typing_extensions import override

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher import request_checks as checks
from kunserve_sgl.integration.launcher.request_bodies import shown
from kunserve_sgl.integration.launcher.request_wire import check_readable, check_sampling_types

# Fields of a call that may have a value per prompt.
_PER_PROMPT = (
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask"),
    *("return_hidden_states", "custom_logit_processor", "rid", "extra_key", "lora_path"),
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size"),
)
# The same, where the value of one prompt is a list itself.
_LISTS_FOR_EACH = ("token_ids_logprob", "multi_item_delimiter_indices")


class CheckedRequests(TokenizerManager):  # type: ignore[misc]
    """Refuses what would end a replica, with a ValueError, as upstream refuses other things."""

    @override
    async def generate_request(self, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        """Checks the call as the client wrote it, before SGLang copies it for each answer."""
        try:
            _check_call(obj)
            if self.enable_metrics and (labels := getattr(obj, "custom_labels", None)):
                checks.check_labels(labels, self.server_args.tokenizer_metrics_allowed_custom_labels or ())
        except BadRequestError:
            obj.is_single, obj.rid = False, []  # of this there is nothing to abort, which SGLang does after each stream
            raise
        async with aclosing(super().generate_request(obj, request)) as answers:
            async for answer in answers:
                yield answer

    @override
    async def score_request(
        self, query: Any = None, items: Any = None, label_token_ids: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Refuses an empty list of label tokens, and tokens that the model does not have."""
        if self.is_generation and label_token_ids is not None and not label_token_ids:
            raise BadRequestError("label_token_ids: the list is empty; at least one token is needed")
        checks.check_token_ids("label_token_ids", label_token_ids or (), self.model_config.vocab_size)
        return await super().score_request(query, items, label_token_ids, *args, **kwargs)

    @override
    def _validate_one_request(self, obj: Any, input_ids: Any) -> None:
        """Checks one prompt and what is asked of it, before SGLang computes with it."""
        check_sampling_types(obj.sampling_params)
        checks.check_patterns("stop_regex", obj.sampling_params.get("stop_regex"))
        if input_ids is not None and not isinstance(input_ids, (list, array)):
            raise BadRequestError(f"input_ids: {shown(input_ids)} is no list of token ids")
        super()._validate_one_request(obj, input_ids)
        if isinstance(obj, GenerateReqInput):
            checks.check_logprob_options(
                top_logprobs_num=obj.top_logprobs_num,
                logprob_start_len=obj.logprob_start_len,
                token_ids_logprob=obj.token_ids_logprob,
                vocab_size=self.model_config.vocab_size,
            )

    @override
    def _create_tokenized_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Checks what is going to be sent."""
        try:
            made = super()._create_tokenized_object(obj, *args, **kwargs)
        except (TypeError, OverflowError) as error:
            raise BadRequestError(f"the request makes no sense: {error}") from error
        model = self.model_config
        checks.check_prompt(made.input_ids, model.vocab_size)
        if (embeddings := getattr(made, "input_embeds", None)) is not None:
            checks.check_embeddings(embeddings, model.hidden_size)
        if (overrides := made.positional_embed_overrides) is not None:
            checks.check_embeddings(overrides.embeds, model.hidden_size)
            checks.check_positions("positional_embed_overrides", overrides.positions, len(made.input_ids or ()))
        if made.multi_item_delimiter_indices:
            checks.check_positions(
                "multi_item_delimiter_indices", made.multi_item_delimiter_indices, len(made.input_ids or ())
            )
        check_readable(made)
        checks.check_sampling(made.sampling_params, vocab_size=model.vocab_size, context_tokens=self.context_len)
        return made


def _check_call(obj: Any) -> None:
    prompts = checks.count_prompts(obj.text, obj.input_ids, obj.input_embeds)
    overrides = obj.positional_embed_overrides
    for each in overrides if isinstance(overrides, list) else [overrides]:
        if each is not None and not isinstance(each, PositionalEmbeds):
            raise BadRequestError("positional_embed_overrides: no field of requests over HTTP; accepted is null")
    if not isinstance(obj, GenerateReqInput):
        return
    several = checks.check_answer_count(obj.sampling_params, prompts or 1)
    per_prompt = {name: getattr(obj, name) for name in _PER_PROMPT}
    for name in _LISTS_FOR_EACH:
        value = getattr(obj, name)
        if isinstance(value, list) and value and isinstance(value[0], list):
            per_prompt[name] = value
    checks.check_lists(per_prompt, 1 if prompts is None and several else prompts)


async def answer_bad_request(request: Request, error: Exception) -> Response:
    """Answers for routes that answer no ValueError themselves, in the form of the native ones."""
    return ORJSONResponse({"error": {"message": str(error)}}, status_code=HTTPStatus.BAD_REQUEST)

"""SpeculativePipeline: text in, text out, faster than plain decoding and exactly as good."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from inferlab import __version__
from inferlab.config import SpecdecConfig, load_config
from inferlab.draft_modes import DRAFT_MODES
from inferlab.errors import Interrupted
from inferlab.machine import processor_name, usable_cores
from inferlab.models import FakeLM, TargetModel, allowed_vocab, format_of, unknown_ids
from inferlab.models.generation_defaults import Followed, followed, warn_of_not_followed
from inferlab.models.quantized import DENSE
from inferlab.records import Speculation
from inferlab.scheduler import Request
from inferlab.specdec.assembly import plan_drafter
from inferlab.specdec.control import Controller
from inferlab.specdec.controllers import make_controller
from inferlab.specdec.conversation import Conversations, Message, texts_of
from inferlab.specdec.cost_cache import describe_costs, kept_costs, model_facts
from inferlab.specdec.costing import check, measure
from inferlab.specdec.costs import CostModel, StepTime
from inferlab.specdec.drafters.plan import load_target
from inferlab.specdec.engine import Engine
from inferlab.specdec.grammar import Grammar, Grammars
from inferlab.specdec.pieces import Piece, run_pieces
from inferlab.specdec.planner import UNMEASURED, CostController
from inferlab.specdec.policies import Policy, make_policy
from inferlab.specdec.recorded import check_folder
from inferlab.specdec.recording import Recorder, describe_tree
from inferlab.specdec.results import SpecdecResult, request_record, result_mapping
from inferlab.specdec.tree import TreeShape, are_chains
from inferlab.types import SamplingParams, check_text

Prompt = str | Sequence[int]

DEFAULT_KV_MEMORY_MB = 2048


class GenerationError(RuntimeError):
    """A request failed while it ran. ``results`` holds all requests' results, the good ones too."""

    def __init__(self, message: str, results: list[SpecdecResult]) -> None:
        super().__init__(message)
        self.results = results


class SpeculativePipeline:
    """A target model, a drafter and the engine between them.

    Values come from keywords, else from the YAML file, else from the defaults of
    :class:`inferlab.config.SpecdecConfig`; without a file that is the bundled pair, greedy.

    Args:
        config_path: a ``specdec`` YAML file; ``configs/NAME.yaml`` is found from anywhere.
        base_model: the target: hub id, local directory or ``inferlab/tiny``.
        draft_model: the draft model of ``draft_mode="vanilla"``. With another tokenizer than the
            target's it drafts by the tokens they share, or by text.
        draft_mode: ``vanilla`` (draft model), ``eagle`` and ``medusa`` (trained heads), ``ngram``
            (prompt lookup), ``recycling`` (the target's runners-up), ``self`` (its first layers),
            ``ensemble`` (several at once), the untrained ``medusa-lite`` and ``eagle-lite``, or
            ``none`` (plain decoding through the same engine).
        implementation: ``hf`` (real models) or ``fake`` (instant, deterministic, no weights).
        policy: name of an acceptance policy, or a Policy.
        controller: ``cost`` (drafts what pays), ``fixed`` (always K levels) or ``adaptive``, or a
            Controller; by default ``fixed`` where ``k`` or the tree's widths are given, else
            ``cost``.
        k: levels drafted per step by the fixed controller, 0 to 64: the most draft tokens along one
            path. How many nodes they hold is the tree's to say.
        tree: ``chain``, ``optimal``, ``grown`` (eagle, medusa) or children per node by depth, e.g.
            ``[4, 2, 1]``; None: what suits the drafter.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        seed: key of the noise; the same seed gives the same tokens whatever the drafter.
        agree_k: the k of the ``topk_agree`` policy.
        record: directory to record the steps in, for `inferlab replay`; each pipeline adds a run.
            Costs time, changes no token.
        target, draft: loaded models to use in place of ``base_model`` and ``draft_model``.
        shape: a static tree of any form, in place of ``tree``.
        quantization, draft_quantization: ``int8`` or ``int4``: the weights of target and draft
            model are packed when they are loaded (on a CPU); ``none``: as they are; ``dense``:
            those that come rounded are made dense. Not for models that are given as objects.
        tensor_parallel: how many processes the target is shared out over, each with a device of
            its own. This process leads, and starts the others; under torchrun they are there, do
            as rank 0 says, and never come back from this call.
        device_map: puts the target's layers on several devices in turn: ``auto``, ``balanced``,
            ``balanced_low_0``, ``sequential``, or a device for each module.
        overrides: any other key of SpecdecConfig (``tau``, ``p``, ``max_k``, ``max_batch``, ...).

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
        ValueError: models that cannot be loaded or do not fit together.
    """

    def __init__(
        self,
        config_path: str | None = None,
        *,
        base_model: str | os.PathLike[str] | None = None,
        draft_model: str | os.PathLike[str] | None = None,
        draft_mode: str | None = None,
        implementation: str | None = None,
        policy: str | Policy | None = None,
        controller: str | Controller | None = None,
        k: int | None = None,
        tree: str | Sequence[int] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        agree_k: int | None = None,
        record: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        draft_quantization: str | None = None,
        tensor_parallel: int | None = None,
        device_map: str | Mapping[str, int | str] | None = None,
        target: TargetModel | None = None,
        draft: TargetModel | None = None,
        shape: TreeShape | None = None,
        config: SpecdecConfig | None = None,
        **overrides: Any,
    ) -> None:
        if policy is not None and not isinstance(policy, (str, Policy)):
            raise TypeError(f"policy is {policy!r}; it must be a name or a Policy")
        if controller is not None and not isinstance(controller, (str, Controller)):
            raise TypeError(f"controller is {controller!r}; it must be a name or a Controller")
        for key, name, loaded in (
            ("target", "base_model", target),
            ("draft", "draft_model", draft),
        ):
            if loaded is not None and not isinstance(loaded, TargetModel):
                raise TypeError(
                    f"{key} is {loaded!r}; it must be a loaded model, such as HFModel.load gives: "
                    f"names and directories are {name}"
                )
        overrides.update(
            base_model=_path("base_model", base_model),
            draft_model=_path("draft_model", draft_model),
            draft_mode=draft_mode,
            implementation=implementation,
            policy=policy if isinstance(policy, str) else None,
            controller=controller if isinstance(controller, str) else None,
            tree=tree if tree is None or isinstance(tree, str) else list(tree),
            device=device,
            dtype=dtype,
            seed=seed,
            agree_k=agree_k,
            record=_path("record", record),
            quantization=quantization,
            draft_quantization=draft_quantization,
            tensor_parallel=tensor_parallel,
            device_map=device_map,
        )
        if k is not None:
            overrides["max_draft"] = k
        given = sorted(name for name, value in overrides.items() if value is not None)
        if config is None:
            config = load_config(SpecdecConfig, config_path, overrides)
        elif config_path is not None or given:
            raise ValueError(
                f"config is given, and so is {config_path or ', '.join(given)}; put everything "
                f"into the SpecdecConfig, or leave config out"
            )
        self.config = config
        if config.record is not None:
            check_folder(Path(config.record))  # before anything is loaded
        self.policy = policy if isinstance(policy, Policy) else self._make_policy()
        self.controller: Controller = (
            controller if isinstance(controller, Controller) else self._make_controller()
        )
        if target is not None and (tensor_parallel not in (None, 1) or device_map is not None):
            raise ValueError(
                "target is a loaded model, which lies where it lies; tensor_parallel and "
                "device_map are for models that base_model names"
            )
        for key, given_model in (("quantization", target), ("draft_quantization", draft)):
            wanted = getattr(config, key)
            if given_model is not None and wanted not in (
                "none",
                given_model.quantization or DENSE,
            ):
                raise ValueError(
                    f"{key} is {wanted!r}, but a model was given that is not: load it with "
                    f"HFModel.load(..., quantization={wanted!r}), or leave {key} out"
                )
        if target is not None and config.kv_cache_dtype not in ("auto", target.kv_cache_dtype):
            raise ValueError(
                f"kv_cache_dtype is {config.kv_cache_dtype!r}, but target is a model whose K/V is "
                f"{target.kv_cache_dtype!r}: load it with HFModel.load(..., kv_cache_dtype="
                f"{config.kv_cache_dtype!r}), or leave kv_cache_dtype out"
            )
        self.target = target if target is not None else self._load_target()
        self._checkpoint = Followed()  # what the target's own generation_config asks for
        plain = self.target.plain()
        if plain is not None and not config.ignore_generation_config:
            with plain as model:
                self._checkpoint = followed(model, self.target.vocab_size)
                warn_of_not_followed(model, self.target.name)
        self._bias = dict(self._checkpoint.bias)
        if self.target.tokenizer is not None and plain is not None:
            gaps = unknown_ids(self.target.tokenizer, allowed_vocab(self.target))
            self._bias |= dict.fromkeys(gaps, float("-inf"))
        self._plan = plan_drafter(
            config, self.target, self.policy, self._max_levels(), draft, shape
        )
        self.engine = self._make_engine()
        plans = isinstance(self.controller, CostController) and self.known_costs is None
        costs = None
        if (plans and self._plan is not None) or config.record is not None:
            costs = self.costs()
        if costs is not None and isinstance(self.controller, CostController) and plans:
            self.controller.costs = costs
        if config.record is not None:
            self.engine.recorder = Recorder(config.record, self._facts(costs))

    @property
    def implementation(self) -> str:
        """``hf`` or ``fake``."""
        return self.config.implementation

    @property
    def device(self) -> str:
        """Where the target runs: ``cpu``, ``cuda:0``, ..."""
        return str(self.target.device)

    @property
    def draft_name(self) -> str | None:
        """The draft model or heads; None where no weights draft."""
        return self._plan.model if self._plan is not None else None

    @property
    def draft_model(self) -> TargetModel | None:
        """The loaded draft model of ``draft_mode="vanilla"``."""
        return getattr(self.engine.drafter, "model", None)

    def describe_drafter(self) -> dict[str, Any]:
        """Who drafts, and how."""
        drafter = self.engine.drafter
        return {} if drafter is None else drafter.describe()

    def costs(self, anew: bool = False) -> CostModel | None:
        """What steps of this pipeline cost, by batch, nodes and context; None where the target's
        context or the K/V cache have no room to measure.

        Measured when a machine first meets a model and a drafter (one to a few seconds),
        and kept in the user's cache directory.

        Args:
            anew: measure, whatever is kept.
        """

        def measured() -> CostModel | None:
            return measure(
                self.target,
                self.policy,
                self._num_pages(),
                self.config.page_size,
                self._plan.build if self._plan is not None else None,
                max_batch=self.config.max_batch,
                max_k=self.controller.max_k,
            )

        settings = self.config.model_dump(mode="json", include=_COST_SETTINGS, warnings=False)
        draft = [self.draft_name, self.describe_drafter(), model_facts(self.draft_model)]
        facts = describe_costs(self.target, draft, self.controller.max_k, settings)
        return kept_costs(facts, measured, anew=anew, keep=self.config.cost_cache)

    def _facts(self, costs: CostModel | None) -> dict[str, Any]:
        """What a recording says of its run."""
        c = self.config
        drafter = self.engine.drafter
        return {
            "versions": {"inferlab": __version__, "torch": torch.__version__},
            "machine": [processor_name(), usable_cores(), self.device, torch.get_num_threads()],
            "model": self.target.name,
            "dtype": format_of(self.target),
            "engine": getattr(self.target, "engine", None),
            "implementation": c.implementation,
            "draft_mode": c.draft_mode,
            "draft_model": self.draft_name,
            "drafter": self.describe_drafter(),
            "tree": describe_tree(drafter),
            "ladder": list(drafter.ladder()) if drafter is not None else [],
            "known": drafter.known._asdict() if drafter is not None else None,
            "policy": self.policy.describe(),
            "controller": self.controller.describe(),
            "K": min(self.controller.max_k, drafter.max_depth) if drafter is not None else 0,
            "temperature": c.effective_temperature,
            "seed": c.seed,
            "max_batch": c.max_batch,
            "context": self.target.context_length,
            "costs": costs.to_json() if costs is not None else None,
        }

    @property
    def known_costs(self) -> CostModel | None:
        """What steps cost, as far as the controller knows it."""
        controller = self.controller
        if isinstance(controller, CostController) and controller.costs is not UNMEASURED:
            return controller.costs
        return None

    def check_costs(self, costs: CostModel) -> list[tuple[StepTime, float]]:
        """Plain and drafted steps measured now, each with the ms that ``costs`` predicts; what
        drafting takes is not part of either."""
        c, drafter = self.config, self.engine.drafter
        pages = self._num_pages()
        return check(
            costs.step,
            self.target,
            self.policy,
            pages,
            c.page_size,
            max_batch=c.max_batch,
            chains=drafter is not None and are_chains(drafter.ladder()),
        )

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        messages: Sequence[Message] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        do_sample: bool | None = None,
        stop: str | Sequence[str] | None = None,
        grammar: Grammar | None = None,
        on_token: Callable[[Piece], None] | None = None,
        on_result: Callable[[int, SpecdecResult], None] | None = None,
        **params: Any,
    ) -> Any:
        """Generates for one prompt or for a list of them, as one batch.

        May be called from several threads, also from ``on_result``: the requests of all of them run
        in one batch. Forwards of pipelines that share a model wait for each other.

        Args:
            prompt: text or token ids, or a list of such.
            max_tokens: new tokens at most.
            temperature: 0 is greedy. ``do_sample=False`` is the same as 0.
            top_k, top_p, min_p: filters, as in :class:`inferlab.SamplingParams`.
            seed: one for all prompts, or a list with one per prompt. A prompt's tokens depend on
                its own seed only, so equal prompts with equal seeds give equal texts.
            stop: strings that end the text (and are cut off).
            grammar: what each text must be: ``Grammar.json_schema({...})``,
                ``Grammar.json_object()``, ``Grammar.regex("...")`` or ``Grammar.choice([...])``.
                Its tokens are chosen among those that may follow, whoever drafts; ``finish_reason``
                is "stop" where the text is whole. Tokens that the checkpoint forces at the ends of
                a text are not forced then. Needs the extra ``serve``.
            messages: a conversation, ``{"role": ..., "content": ...}`` each, in place of a prompt;
                the tokenizer's chat template makes the prompt of it.
            on_token: called with the text as it comes, a `Piece` for each step (see `stream`).
            on_result: called with index and result as prompts finish.
            params: any other field of SamplingParams (``min_tokens``, ``logit_bias``, ...).

        Returns:
            A mapping for one prompt, a list of mappings for a list, with the keys

            * ``text`` (what follows the prompt's text, a blank included that it starts with),
              ``token_ids`` (new tokens only; also as ``generated_tokens``),
              ``num_tokens``, ``finish_reason``;
            * ``latency_ms`` (from submission to the last token), ``first_token_ms``,
              ``tokens_per_second`` (also as ``tokens_per_sec``), ``timings_ms`` by phase;
            * ``acceptance_rate``: accepted draft tokens / draft tokens offered along one path;
            * ``mean_accepted_length``: tokens kept per verification step, **bonus token
              included**, so 1.0 is plain decoding;
            * ``acceptance_by_position``, ``offered_by_position`` (steps), ``proposed``,
              ``accepted``, ``steps``, ``target_forwards`` (steps and prompt chunks);
            * ``verification_time_ms``, ``generation_time_ms`` (drafting), ``mem_rss_mb``;
            * ``policy``, ``controller``, ``lossless``, ``impl``, ``device``, ``dtype``,
              ``base_model``, ``draft_model``, ``draft_mode``, ``seed``;
            * ``record``: what all of these are read off, as JSON types; :func:`inferlab.record_of`
              makes a :class:`inferlab.RequestRecord` of it.

        Raises:
            ValueError: a parameter out of range, a grammar that is not supported, or a prompt that
                is empty, cannot be encoded or is too long; no prompt has run then.
            GenerationError: a request failed while running (e.g. NaN logits).
            Interrupted: Ctrl-C; ``results`` holds what there was.
            RuntimeError: in a child of `fork` that cannot go on with what it was given: a model on
                a GPU, or a pipeline in the middle of a step.
        """
        single, prompts, requests = self._requests(
            prompt,
            params
            | {
                "messages": messages,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "seed": seed,
                "do_sample": do_sample,
                "stop": stop,
                "grammar": grammar,
            },
        )
        results: dict[int, SpecdecResult] = {}
        with closing(self._run(prompts, requests, on_token is not None)) as pieces:
            for piece in pieces:
                try:
                    if on_token is not None:
                        on_token(piece)
                    if piece.result is not None:
                        results[piece.index] = piece.result
                        if on_result is not None:
                            on_result(piece.index, piece.result)
                except KeyboardInterrupt as interrupt:
                    pieces.throw(interrupt)
        ordered = [results[index] for index in range(len(requests))]
        return ordered[0] if single else ordered

    def check(self, prompt: Prompt | Sequence[Prompt]) -> None:
        """Raises the ValueError with which `generate` would refuse a prompt, before it runs."""
        for request in self._requests(prompt, {})[2]:
            self.engine.check(request)

    def request(self, prompt: Prompt, **params: Any) -> Request:
        """A request for the engine (`Engine.add`), decoded as `generate` would decode it.

        Args:
            prompt: text or token ids.
            params: as of `generate`.

        Raises:
            TypeError, ValueError: as `generate` does.
        """
        _, _, requests = self._requests(prompt, params)
        if len(requests) != 1:  # `generate` takes an empty list for no prompts
            raise ValueError("prompt is empty; it must have at least one token")
        return requests[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        **params: Any,
    ) -> Generator[Piece]:
        """Generates as `generate` does, and yields the text as it comes.

        What is still open is kept back: a character that lacks bytes, an end that may be the
        beginning of a stop string. So no text is ever taken back, and a prompt's pieces together
        are the ``text`` of its result, which comes with its last piece. Closing the iterator (as
        leaving a ``for`` loop does, once nothing refers to it) ends the generation.

        Args:
            prompt, max_tokens, temperature, params: see `generate`.

        Raises:
            TypeError, ValueError: as `generate` does, at once.
            GenerationError: a request failed while running, once all have ended.
        """
        given = params | {"max_tokens": max_tokens, "temperature": temperature}
        _, prompts, requests = self._requests(prompt, given)
        for request in requests:
            self.engine.check(request)
        return self._run(prompts, requests)

    async def astream(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        **params: Any,
    ) -> AsyncGenerator[Piece]:
        """`stream` for asyncio: the steps are made in a thread, and several streams share them."""
        pieces = self.stream(prompt, max_tokens, temperature, **params)
        step: asyncio.Future[Piece | None] | None = None
        try:
            while True:
                step = asyncio.get_running_loop().run_in_executor(None, next, pieces, None)
                piece = await asyncio.shield(step)
                if piece is None:
                    return
                yield piece
        finally:
            if step is not None and not step.done():  # cancelled in the middle of a step
                await asyncio.wait([step])
            pieces.close()

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as a prompt of token ids, up to where the assistant's answer begins.
        Names of special tokens in messages are text.

        Raises:
            ValueError: the tokenizer has no chat template, or it refuses these messages.
        """
        tokenizer = self.target.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{self.target.name} has no chat template; add chat_template.jinja to the model's "
                f"directory, or give a text (in place of chat, the endpoint completions)"
            )
        for i, message in enumerate(messages):
            for text in texts_of(message):
                check_text(f"message {i}", text)
        try:
            return self._conversations.encode(messages)
        except Exception as error:
            raise ValueError(
                f"messages do not suit the chat template of {self.target.name}: {error}"
            ) from error

    @cached_property
    def _conversations(self) -> Conversations:
        return Conversations(self.target.tokenizer)

    def _run(
        self, prompts: list[Prompt], requests: list[Request], with_text: bool = True
    ) -> Generator[Piece]:
        results: list[SpecdecResult | None] = [None] * len(requests)
        before = self.controller.tally()

        def result_of(index: int) -> SpecdecResult:
            controller = self.controller.describe(before)
            result = self._mapping(prompts[index], requests[index], controller)
            results[index] = result
            return result

        try:
            yield from run_pieces(self.engine, requests, result_of, with_text)
        except KeyboardInterrupt as interrupt:
            for request in requests:
                if request.finish_reason in (None, "aborted"):
                    request.finish_reason = "interrupted"
            partial = [result or result_of(i) for i, result in enumerate(results)]
            raise Interrupted(partial) from interrupt
        for index, request in enumerate(requests):
            if request.error is not None:
                raise GenerationError(
                    f"prompt {index}: {request.error}", list(filter(None, results))
                )

    def _requests(
        self, prompt: Prompt | Sequence[Prompt] | None, given: Mapping[str, Any]
    ) -> tuple[bool, list[Prompt], list[Request]]:
        """Whether there is one prompt, the prompts, and the request of each, with what was given
        and, for the rest, what the configuration says."""
        unknown = sorted(given.keys() - _PARAMETERS)
        if unknown:
            raise TypeError(
                f"generate() knows no {', '.join(unknown)}; beside its own arguments it takes "
                f"{', '.join(sorted(_PARAMETERS - {'do_sample', 'messages', 'grammar'}))}"
            )
        given = {name: value for name, value in given.items() if value is not None}
        messages = given.pop("messages", None)
        if messages is not None and prompt is not None:
            raise ValueError("prompt and messages are both given; give one of them")
        single, prompts = _as_list(prompt if messages is None else self.chat_prompt(messages))
        seeds = self._seeds(given.pop("seed", None), len(prompts))
        if given.pop("do_sample", None) is False:
            given["temperature"] = 0.0
        grammar = given.pop("grammar", None)
        if grammar is not None and not isinstance(grammar, Grammar):
            raise TypeError(f"grammar is {grammar!r}; it must be a Grammar")
        stop = given.pop("stop", None)
        if stop is not None:
            given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        values = self._defaults() | given
        if self._bias:
            bias = dict(values.get("logit_bias") or {})
            for token, value in self._bias.items():
                bias[token] = bias.get(token, 0.0) + value
            values["logit_bias"] = bias
        if "max_tokens" in given and "min_tokens" not in given:
            values["min_tokens"] = min(values["min_tokens"], given["max_tokens"])
        follows = "min_tokens" not in given and "min_new_tokens" not in self.config.model_fields_set
        requests = []
        for ids, own_seed in zip(map(self.encode, prompts), seeds, strict=True):
            if follows:
                least = self._checkpoint.least_new_tokens(len(ids))
                values["min_tokens"] = min(least, values["max_tokens"])
            params = SamplingParams(**values, seed=own_seed)
            if grammar is None:
                forced = self._checkpoint.forced(len(ids), params.max_tokens)
                requests.append(Request(ids, params, forced))
            else:
                constraint = self._grammars.constraint(grammar, params)
                requests.append(Request(ids, params, constraint=constraint))
        return single, prompts, requests

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.target)

    def _seeds(self, seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            return [self.config.seed] * count
        if not isinstance(seed, (list, tuple)):
            return [seed] * count  # type: ignore[list-item]
        if len(seed) != count:
            raise ValueError(f"seed has {len(seed)} entries for {count} prompts; give one each")
        return list(seed)

    def _defaults(self) -> dict[str, Any]:
        c = self.config
        own = "repetition_penalty" in c.model_fields_set
        return {
            "max_tokens": c.max_new_tokens,
            "min_tokens": c.min_new_tokens,
            "temperature": c.effective_temperature,
            "top_k": c.top_k,
            "top_p": c.top_p,
            "min_p": c.min_p,
            "repetition_penalty": (c if own else self._checkpoint).repetition_penalty,
            "presence_penalty": c.presence_penalty,
            "frequency_penalty": c.frequency_penalty,
            "stop": tuple(c.stop),
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids. Raises ValueError where it is empty or cannot be encoded."""
        ids: list[int]
        if not isinstance(prompt, str):
            ids = list(prompt)
        elif self.target.tokenizer is None:
            raise ValueError(
                f"{self.target.name} has no tokenizer; give the prompt as token ids, or add "
                f"tokenizer.json to the model's directory"
            )
        else:
            check_text("prompt", prompt)
            ids = self.target.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt is empty; it must have at least one token")
        return ids

    def _mapping(
        self, prompt: Prompt, request: Request, controller: dict[str, Any]
    ) -> SpecdecResult:
        result = self.engine.result(request)
        speculation = Speculation(
            impl=self.config.implementation,
            draft_mode=self.config.draft_mode,
            draft_model=self.draft_name,
            policy=self.policy.describe(),
            controller=controller,
            lossless=self.policy.lossless,
            stats=result.stats,
        )
        record = request_record(
            result,
            request.params,
            speculation,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=len(request.prompt),
            model=self.target.name,
            device=self.device,
            dtype=format_of(self.target),
        )
        return result_mapping(record)

    def _make_policy(self) -> Policy:
        c = self.config
        return make_policy(c.policy, tau=c.tau, k=c.agree_k, p=c.p)

    def _make_controller(self) -> Controller:
        c = self.config
        widths = c.tree if isinstance(c.tree, tuple) else None
        if c.controller_name == "fixed":
            return make_controller("fixed", k=len(widths) if widths is not None else c.levels)
        bounded = c.max_draft is not None and "max_k" not in c.model_fields_set
        max_k = c.levels if bounded else c.max_k
        if widths is not None:
            max_k = min(max_k, len(widths))
        return make_controller(
            c.controller_name,
            min_k=min(c.min_k, max_k),
            max_k=max_k,
            target_acceptance=c.target_acceptance,
        )

    def _max_levels(self) -> int:
        """Levels of the largest tree: of chains as many as the controller may ask for."""
        c = self.config
        is_chain = (c.tree or DRAFT_MODES[c.draft_mode].tree) == "chain"
        return self.controller.max_k if is_chain else min(c.levels, self.controller.max_k)

    def _load_target(self) -> TargetModel:
        if self.config.implementation == "fake":
            return FakeLM(seed=self.config.seed)
        return load_target(self.config)

    def _make_engine(self) -> Engine:
        c = self.config
        pages = self._num_pages()
        return Engine(
            self.target,
            self.target.new_cache(pages, c.page_size),
            self.policy,
            self.controller,
            self._plan.build(pages) if self._plan is not None else None,
            c.max_batch,
            shares_prefixes=c.share_prefixes,
        )

    def _num_pages(self) -> int:
        """As many pages as a full batch of full contexts needs, within the memory allowed."""
        c = self.config
        per_token = self.target.new_cache(1, c.page_size).bytes_per_token
        if self._plan is not None:
            per_token += self._plan.bytes_per_token
        budget = (c.kv_memory_mb or DEFAULT_KV_MEMORY_MB) * 2**20
        pages = int(budget // (per_token * c.page_size))
        context = self.target.context_length or 4096
        pages = min(pages, c.max_batch * (-(-context // c.page_size) + 256 // c.page_size + 1))
        if c.num_pages is not None:
            pages = min(pages, c.num_pages) if c.kv_memory_mb is not None else c.num_pages
        if pages < 1:
            raise ValueError(
                f"kv_memory_mb is {c.kv_memory_mb}; one page of {c.page_size} tokens needs "
                f"{per_token * c.page_size / 2**20:.3f} MB"
            )
        return pages


_COST_SETTINGS = {
    *("draft_mode", "max_draft", "tree", "tree_nodes", "tree_width", "ngram", "medusa", "eagle"),
    *("early_exit", "ensemble", "policy", "page_size", "max_batch", "num_pages", "kv_memory_mb"),
    *("tensor_parallel", "device_map"),
}
"""What of the configuration may change what a step costs."""

_PARAMETERS = {field.name for field in fields(SamplingParams)} | {
    *("do_sample", "messages", "grammar")
}


def _path(name: str, given: str | os.PathLike[str] | None) -> str | None:
    if given is None:
        return None
    path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(f"{name} is {given!r}; it must be a text or a path")
    return path


def _as_list(prompt: Any) -> tuple[bool, list[Prompt]]:
    """Whether there is one prompt, and the prompts: texts or lists of token ids."""

    def plain(value: Any) -> Any:
        # Arrays and tensors of token ids.
        return value.tolist() if hasattr(value, "tolist") else value

    def is_ids(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(
            isinstance(t, Integral) and not isinstance(t, bool) for t in value
        )

    prompt = plain(prompt)
    if isinstance(prompt, str):
        return True, [prompt]
    if isinstance(prompt, (list, tuple)):
        if prompt and is_ids(prompt):
            return True, [list(map(int, prompt))]
        prompts = [plain(p) for p in prompt]
        if all(isinstance(p, str) or is_ids(p) for p in prompts):
            return False, [p if isinstance(p, str) else [int(t) for t in p] for p in prompts]
    raise TypeError(
        f"prompt is {str(prompt)[:60]!r} ({type(prompt).__name__}); it must be a text, a list of "
        f"token ids, or a list of such"
    )

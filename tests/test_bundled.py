"""The bundled model, SAEs and attributes through the whole path, up to the official client."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import uvicorn
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from bench.readings import measured
from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.admission.conditions import probes
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, TraceParams
from steerserve.engine.outputs.verdicts import verdicts
from steerserve.runtime.load import BUNDLED, Runtime, load_runtime
from steerserve.server.app import create_app
from tests import tiny

ATTRIBUTES = {
    "topic/world", "topic/sports", "topic/business", "topic/sci-tech", "sentiment/positive", "sentiment/negative",
    "register/archaic", "register/modern", "formality/formal", "formality/informal",
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return load_runtime(None, None, None, EngineConfig())


@pytest.fixture(scope="module")
def client(runtime: Runtime) -> Iterator[OpenAI]:
    server = uvicorn.Server(uvicorn.Config(create_app(runtime.service, ServerConfig()), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made:
        yield made
    server.should_exit = True
    thread.join()


def test_everything_that_ships_belongs_together(runtime: Runtime) -> None:
    service = runtime.service
    assert set(service.attributes) == ATTRIBUTES
    assert len({one["layer"] for one in service.saes.values()}) >= 3
    assert {one["policy"] for one in service.saes.values()} == {"mask", "visible"}
    for card in service.attributes.values():
        assert len(card["profile"]["curve"]) == 65
        assert card["provenance"]["classifier"]["accuracy"] > 0.6
        for site in card["sites"].values():
            assert sum(feature["weight"] != 0 for feature in site["features"]) == 20
            assert service.saes[site["sae"]]["sha256"] == site["sae_sha256"]


# Target and contrast of each attribute, in words of our own.
SENTENCES = {
    "topic/world": (
        ("the president met rebel leaders after soldiers killed dozens in the capital.",
         "voters in the country went to the polls as the prime minister called for peace talks."),
        ("the striker scored twice and the team won the cup final.",
         "the company said quarterly profit rose on strong sales."),
    ),
    "topic/sports": (
        ("the striker scored twice and the team won the cup final.",
         "the coach said his players were ready for the second half of the season."),
        ("the company said quarterly profit rose on strong sales.",
         "the president met rebel leaders after soldiers killed dozens in the capital."),
    ),
    "topic/business": (
        ("the company said quarterly profit rose on strong sales.",
         "shares fell on wall street as oil prices reached a new high."),
        ("the striker scored twice and the team won the cup final.",
         "scientists found water on the moon with a new space telescope."),
    ),
    "topic/sci-tech": (
        ("scientists found water on the moon with a new space telescope.",
         "the software update fixes a security hole in the web browser."),
        ("the striker scored twice and the team won the cup final.",
         "the president met rebel leaders after soldiers killed dozens in the capital."),
    ),
    "sentiment/positive": (
        ("a wonderful film, beautifully acted and a joy to watch from start to finish.",
         "i loved this movie, it is one of the best i have ever seen."),
        ("a terrible film, badly acted and boring from start to finish.",
         "i hated this movie, it is one of the worst i have ever seen."),
    ),
    "register/archaic": (
        ("and it came to pass that he spake unto them, saying, thou shalt not go thither.",
         "ye have heard what he saith; therefore thou shalt fear him."),
        ("he told them that they should not go there.",
         "you have heard what he says, so you should fear him."),
    ),
    "formality/formal": (
        ("the committee concluded that further measures would be required to protect the environment.",
         "officials declined to comment on the proposed legislation."),
        ("lol i dont know why u would do that haha!!",
         "omg that is so cool, cant wait to see ya!"),
    ),
}  # fmt: skip
OPPOSITES = {
    "sentiment/negative": "sentiment/positive",
    "register/modern": "register/archaic",
    "formality/informal": "formality/formal",
}


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_every_probe_ranks_plain_texts_right(name: str, runtime: Runtime) -> None:
    card = runtime.service.attributes[name]["probe"]
    assert card["layer"] == 5 and card["accuracy"] > 0.7 and card["texts"] > 1000
    shows, does_not = SENTENCES[OPPOSITES.get(name, name)][:: -1 if name in OPPOSITES else 1]
    engine = runtime.engine
    asked = [probes((name,), engine.catalogue)] * (len(shows) + len(does_not))
    ids = [engine.tokenizer.encode(text, add_special_tokens=False).ids for text in [*shows, *does_not]]
    found = [one[name] for one in verdicts(engine.model, ids, asked)]
    assert min(found[: len(shows)]) > max(found[len(shows) :])


@pytest.mark.parametrize("max_kl", [0.3, 0.02])
def test_a_limit_on_the_measured_kl_holds_at_bundled_strengths(runtime: Runtime, max_kl: float) -> None:
    push = Intervention(attribute="topic/sports", strength=0.5, schedule="uniform")
    feature = Intervention(feature=FeatureRef("layer-3-mask", 93), strength=2.0, unit="max_act", scope="masked")
    base = GenerationParams(prompt="the", max_tokens=24, steps=24, ignore_eos=True, measure_kl=True)
    for one, seeds in ((push, (1, 2)), (feature, (1,))):
        rows = [replace(base, seed=seed, interventions=(one,)) for seed in seeds]
        limited = [replace(row, limits=Limits(max_kl=max_kl)) for row in rows]
        found = [result.receipt for _, result in tiny.run(runtime.engine, *rows, *limited)]
        for free, held in zip(found[: len(rows)], found[len(rows) :], strict=True):
            assert free is not None and held is not None
            assert 0 < held["measured_kl"] <= max_kl
            if free["measured_kl"] > max_kl:
                assert held["measured_kl"] > 0.9 * max_kl
                assert held["limits"]["clipped"]["kl_steps"] > 0
                assert held["forward_passes"] <= 1.5 * free["forward_passes"]
            else:
                assert held["interventions"] == free["interventions"]


def test_words_find_features_of_the_labelled_saes(runtime: Runtime) -> None:
    files = sorted((BUNDLED / "saes").glob("*/features.db"))
    assert {path.parent.name for path in files} == {path.name for path in (BUNDLED / "saes").iterdir()}
    assert sum(path.stat().st_size for path in files) < 10 << 20
    features = runtime.service.features
    assert features is not None
    for query in ("football", "lord", "movie", "microsoft", "micorsoft", "oil price"):
        found, total = features.listed(None, query, 0, 5)
        assert total >= 1 and found[0]["label"], query
    described = features.described(found[0]["sae"], found[0]["index"])
    assert described["named_by"] == "contexts" and described["contexts_from"] == "samples"
    assert len(described["curve"]["mean_activation"]) == 17 and len(described["attributes"]) == len(ATTRIBUTES)


def test_its_size_is_what_a_wheel_can_carry() -> None:
    weights = sum(path.stat().st_size for path in (BUNDLED / "model").glob("*.safetensors"))
    assert weights < 64 << 20


def test_mixed_rows_of_the_bundled_model_are_the_same_alone_and_together(runtime: Runtime) -> None:
    names = sorted(ATTRIBUTES)
    rows = [
        GenerationParams(
            prompt=("", "the movie was", "oil prices", "and the lord")[i % 4],
            max_tokens=12 + 4 * (i % 5),
            steps=4 * (1 + i % 3),
            order=("random", "confidence", "margin", "entropy", "sae_stability")[i % 5],
            temperature=(0.0, 0.8, 1.0)[i % 3],
            seed=i,
            interventions=(Intervention(attribute=names[i % len(names)]),) if i % 3 else (),
        )
        for i in range(16)
    ]
    together = [request.canvas for request, _ in tiny.run(runtime.engine, *rows)]
    alone = [tiny.run(runtime.engine, row)[0][0].canvas for row in rows]
    assert together == alone


def test_a_push_is_read_back_along_its_own_direction(runtime: Runtime) -> None:
    plain = GenerationParams(max_tokens=24, steps=12, seed=5, ignore_eos=True)
    for name in ("topic/sports", "register/archaic"):
        push = Intervention(attribute=name, schedule="uniform", scope="response")
        [(_, steered)] = tiny.run(runtime.engine, replace(plain, interventions=(push,)))
        [(_, baseline)] = tiny.run(runtime.engine, plain)
        assert steered.receipt is not None
        assert steered.receipt["interventions"][0]["applied"] is True
        assert steered.text != baseline.text
        [(_, zero)] = tiny.run(runtime.engine, replace(plain, interventions=(replace(push, strength=0.0),)))
        assert zero.tokens == baseline.tokens


def test_feedback_lets_go_of_a_text_that_has_its_attribute(runtime: Runtime) -> None:
    """Pushed at three layers, of which the later ones would show the push to a loop that read its own row."""
    run = measured(runtime.engine, "topic/sports", seed=1, strength=1.2)
    assert (run.reads, run.layers) == ("unsteered twin", [2, 3, 4])
    assert all(step.told == pytest.approx(step.unsteered, abs=6e-7) for step in run.steps)
    assert max(step.own_row - step.unsteered for step in run.steps) > 0.4
    assert run.let_go_at is not None
    released = int(run.let_go_at * 24)
    assert all(step.strength == 0 and step.unsteered >= run.target for step in run.steps[released:])
    assert run.end >= run.target
    # Until the text has it, it is pushed.
    short = next(i for i, step in enumerate(run.steps) if step.unsteered >= run.target)
    assert all(step.strength > 0 for step in run.steps[:short])


def test_a_feature_of_a_bundled_sae_can_be_clamped(runtime: Runtime) -> None:
    sae = next(name for name, one in runtime.service.saes.items() if one["policy"] == "mask")
    stats = runtime.engine.catalogue.saes[sae].stats
    assert stats is not None
    index = int(stats.max_act.argmax())
    push = Intervention(feature=FeatureRef(sae, index), op="clamp", strength=1.0, unit="max_act")
    [(_, result)] = tiny.run(
        runtime.engine, GenerationParams(max_tokens=8, steps=4, ignore_eos=True, interventions=(push,))
    )
    assert result.receipt is not None
    assert result.receipt["interventions"][0]["sites"][0]["positions_touched"] > 0


@pytest.mark.parametrize("asked", [5.68, 2.84, 0.0])
def test_a_clamped_latent_is_read_back_as_asked(runtime: Runtime, asked: float) -> None:
    """By the encoder, at every masked position of every step; and the projection on its row is another number."""
    feature = FeatureRef("layer-3-mask", 93)
    push = Intervention(feature=feature, op="clamp", strength=asked, unit="raw")
    plain = GenerationParams(max_tokens=24, steps=24, ignore_eos=True, seed=1)
    row = replace(plain, interventions=(push,), trace=TraceParams(features=(feature,), positions=True))
    request, events = tiny.solo(runtime.engine, row)
    result = tiny.results(events)[request.id]
    _, when = tiny.replayed(events, request)
    read = []
    for one in result.trace:
        assert one.positions is not None
        masked = [one.positions["layer-3-mask:93"][p] for p in range(24) if when[p] >= one.step]
        assert one.values["layer-3-mask:93"] == pytest.approx(sum(masked) / len(masked), abs=1e-4)
        read += masked
    assert len(read) == sum(range(1, 25))
    assert max(abs(value - asked) for value in read) < 1e-3
    assert result.receipt is not None
    [site] = result.receipt["interventions"][0]["sites"]
    assert site["strength_activation"] == asked


def test_the_official_client_lists_completes_streams_and_steers(client: OpenAI) -> None:
    name, pinned = [model.id for model in client.models.list()]
    assert name == "bundled" and pinned.startswith("bundled@")
    plain = client.completions.create(model="bundled", prompt="the", max_tokens=16, seed=1)
    assert plain.choices[0].text
    with client.completions.create(model="bundled", prompt="the", max_tokens=16, seed=1, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text
    steering = {"interventions": [{"attribute": "topic/sports", "schedule": "commitment"}], "baseline": True}
    steered = client.completions.create(
        model="bundled", prompt="the", max_tokens=16, seed=1, extra_body={"steering": steering}
    )
    extra = json.loads(steered.choices[0].model_dump_json())
    assert extra["baseline"]["text"] == plain.choices[0].text
    assert extra["steering"]["interventions"][0]["applied"] is True
    with pytest.raises(NotFoundError, match="topic/sport'"):
        steering = {"interventions": [{"attribute": "topic/sport"}]}
        client.completions.create(model="bundled", prompt="the", max_tokens=16, extra_body={"steering": steering})


def test_a_client_that_chats_with_its_own_defaults_is_answered(client: OpenAI, runtime: Runtime) -> None:
    """Clients send a max_tokens of their own, such as 256, whatever the model: what fits of it is written."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "news of the day " * 24},
        {"role": "user", "content": "the game"},
    ]
    create = partial(client.chat.completions.create, model="bundled", seed=2, temperature=0)
    answer = create(messages=messages, max_tokens=256)
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.total_tokens <= 128
    [note] = answer.choices[0].model_extra["notes"]  # type: ignore[index]
    start = 1 + len(runtime.engine.tokenizer.encode("news of the day " * 24 + "the game", add_special_tokens=False).ids)
    assert note.startswith(f"max_tokens is {128 - start}, not 256")
    with client.chat.completions.create(
        model="bundled", seed=2, temperature=0, messages=messages, max_tokens=256, stream=True
    ) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[-1].finish_reason == answer.choices[0].finish_reason
    with pytest.raises(BadRequestError, match=f"max_tokens may be {128 - start}"):
        create(messages=messages, max_tokens=256, extra_body={"diffusion": {"steps": 8}})
    with pytest.raises(BadRequestError, match="no room") as full:
        create(messages=[{"role": "user", "content": "the game " * 100}])
    assert full.value.param == "messages"


def test_its_chat_template_is_what_transformers_reads_too(runtime: Runtime) -> None:
    messages = [
        {"role": "system", "content": "news\n"},
        {"role": "user", "content": " "},
        {"role": "user", "content": "the game"},
        {"role": "assistant", "content": "was"},
    ]
    assert runtime.service.chat is not None
    assert runtime.service.chat(messages) == "news\nthe game\nwas"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model", local_files_only=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "news\nthe game\nwas"

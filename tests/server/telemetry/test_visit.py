from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.events import Result
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.server.telemetry.record import Visit, digest

INTERVENTIONS = st.builds(
    Intervention,
    attribute=st.sampled_from(["a", "b"]),
    strength=st.none() | st.floats(-1, 1),
    schedule=st.none() | st.dictionaries(st.sampled_from(["type", "start", "stop"]), st.integers(0, 3), max_size=3),
)


@given(st.lists(INTERVENTIONS, min_size=1, max_size=3).map(tuple))
def test_the_digest_is_of_what_is_asked_and_not_of_how_it_was_written(asked: tuple[Intervention, ...]) -> None:
    turned = tuple(
        Intervention(
            attribute=one.attribute,
            strength=one.strength,
            schedule=dict(reversed(one.schedule.items())) if isinstance(one.schedule, dict) else one.schedule,
        )
        for one in asked
    )
    assert digest(asked) == digest(turned)
    assert digest((*asked, Intervention(attribute="c"))) != digest(asked)
    assert digest((Intervention(vector=VectorRef(1, (0.5,))),)) != digest((Intervention(vector=VectorRef(1, (0.25,))),))


def test_a_visit_adds_its_rows_up() -> None:
    visit = Visit("id", "POST")
    plain = GenerationParams(prompt="a")
    steered = GenerationParams(prompt="a", row=1, interventions=(Intervention(attribute="x"), Intervention("y")))
    for params in (plain, steered, GenerationParams(prompt="b", row=2)):
        visit.admitted(params)
        visit.finished(Result((1, 2), "t", "length", 3, 4, 5, None))
    assert (visit.rows, visit.prompts, visit.attributes) == (3, ["a", "b"], {"x", "y"})
    assert visit.steering == digest(steered.interventions)
    assert (visit.tokens, visit.steps, visit.passes, visit.prompt_tokens) == (6, 9, 12, 15)

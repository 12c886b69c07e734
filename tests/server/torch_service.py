"""The service of an engine that is the real one, over a tiny model."""

from steerserve.engine.engine import TorchEngine
from steerserve.server.service import Service


def service_of(engine: TorchEngine, model_id: str = "text") -> Service:
    facts = engine.catalogue.facts
    return Service(
        engine=engine,
        model_id=model_id,
        created=0,
        decode=engine.decode,
        vocabulary=engine.vocabulary,
        end_ids=frozenset(facts.end_ids),
        max_length=facts.max_length,
        load=lambda: {
            "queue_length": len(engine.waiting) + len(engine.scoring),
            "running_rows": len(engine.running),
            "max_queue": engine.config.max_queue,
            "max_rows": engine.config.max_rows,
        },
        bos_id=facts.bos_id,
        attributes={name: {} for name in engine.catalogue.attributes},
    )

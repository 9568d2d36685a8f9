"""Shadow requests that end before anything was asked."""

import asyncio
from pathlib import Path

from api.admission import Admission
from api.metrics import Metrics
from api.shadow import Mirrored, Shadows
from api.traffic import TrafficControl
from api.upstream import engine_client
from domain.settings import Settings
from domain.traffic import Shadow
from registry.traffic import Plan
from registry.traffic_figures import Figures
from serving.routes import Endpoint, Route, Routes, RouteTable

PLAN = Plan("asst_1", "helper", "t", 1, None, Shadow(percent=100), None)
SHADOW = Endpoint("http://127.0.0.1:1", "m2")


def test_one_that_gives_way_before_its_first_step_holds_nothing(tmp_path: Path) -> None:
    routes = RouteTable()
    routes.replace(Routes({("t", "helper", "candidate"): Route("ver_2", 2, (SHADOW,))}))
    control = TrafficControl(routes, Metrics())
    admission = Admission(places=1, places_per_assistant=1, queue=1, queue_seconds=1.0)

    async def mirror_and_give_way() -> None:
        settings = Settings(home=tmp_path)
        async with engine_client(settings) as engines:
            shadows = Shadows(engines, routes, control, admission, settings)
            shadows.mirror(Mirrored(PLAN, "candidate", "/v1/completions", {}, "req_1", "yes"))
            assert routes.leases(SHADOW) == 1
            shadows.give_way()
            await shadows.aclose()

    asyncio.run(mirror_and_give_way())
    assert (routes.leases(SHADOW), routes.busy(SHADOW.url)) == (0, 0)
    assert control.take_figures() == [Figures("asst_1", "t", "shadow", "ver_2", dropped=1)]

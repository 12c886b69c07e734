"""Which server a request goes to."""

from steerserve.batch.servers import FIRST_PAUSE, LONGEST_PAUSE, Server, with_room


def test_the_server_with_the_fewest_requests_gets_the_next_and_not_the_one_that_failed_at_it() -> None:
    first, second = Server("a", 4, 4, running=3), Server("b", 4, 4, running=2)
    assert with_room([first, second], 0.0, None) is second
    assert with_room([first, second], 0.0, second) is first
    first.running = 4
    assert with_room([first, second], 0.0, second) is second
    second.running = 4
    assert with_room([first, second], 0.0, None) is None


def test_a_server_that_fails_is_tried_with_one_request_at_a_time_and_ever_later() -> None:
    server = Server("a", 8, 8, running=8)
    assert server.failed(10.0)
    assert not server.failed(10.1), "the others that it had are no news"
    assert (server.allowed, server.not_before) == (1, 10.0 + FIRST_PAUSE)
    server.running = 0
    pauses = []
    for _ in range(8):
        now = server.not_before
        assert server.has_room(now)
        assert not server.failed(now)
        pauses.append(server.not_before - now)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, *[LONGEST_PAUSE] * 3]
    assert server.silent_since == 10.0
    server.answered()
    assert server.silent_since is None and server.allowed == 2
    for _ in range(10):
        server.answered()
    assert server.allowed == 8


def test_a_server_that_turns_requests_away_is_left_alone_and_gets_half_as_many_then() -> None:
    server = Server("a", 8, 8)
    server.turned_away(1.0, 5.0)
    server.turned_away(1.1, 6.0)
    assert (server.allowed, server.not_before) == (4, 7.1)
    assert not server.has_room(7.0) and server.has_room(7.1)
    server.turned_away(7.2, 0.0)
    assert server.allowed == 2 and server.not_before > 7.2

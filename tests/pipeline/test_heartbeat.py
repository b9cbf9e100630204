from pathlib import Path

from pipeline.cluster import heartbeat
from pipeline.cluster.heartbeat import Heartbeat

WORKERS = {"a": {"metrics": {"memory": 2**30}}, "b": {"metrics": {"memory": 2**29}}}


def test_a_line_when_it_is_time_or_when_there_is_something_to_say(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "extract.log"
    log = Heartbeat(path, shards=3)
    log.beat(WORKERS)
    assert not path.exists()
    log.count(32)
    log.beat(WORKERS, "begins")
    log._due = 0.0
    log.beat(WORKERS)
    log.beat(WORKERS)
    first, second = path.read_text().splitlines()
    assert first.endswith("workers 2 memory 1.5 GiB begins")
    assert "shards 1/3 images 32 " in second
    assert heartbeat.EVERY == 60


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the place of the folder")
    Heartbeat(tmp_path / "logs" / "extract.log", 1).beat({}, "begins")

"""CSV files as SCADA systems and loggers write them: what is understood, what is asked."""

import gzip
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

import csv_layout
from csv_names import Feature, Object, Park
from csv_samples import Reader
from csv_times import SECOND, Interval, moment

TEN_MINUTES = Interval(0, 0, 600 * SECOND)
FEATURES = {"wind_speed": Feature(1, "wind_speed", "m/s", TEN_MINUTES),
            "active_power": Feature(2, "active_power", "kW", TEN_MINUTES),
            "hourly": Feature(3, "hourly", None, Interval(0, 0, 3600 * SECOND)),
            "energy": Feature(4, "energy", "kWh", Interval(0, 1)),
            "bill": Feature(5, "bill", None, Interval(1))}
NAMES = ("LAN-1", "LAN-10", "LAN-2", "LAN")
OBJECTS = [Object(n, name, FEATURES) for n, name in enumerate(NAMES, 1)]
GIVEN = {"zone": "UTC", "stamps": "end", "object": "LAN-1"}
WIND, POWER = (1, 1), (1, 2)


@pytest.fixture
def reader(tmp_path):
    """Return a function that gives the reader of a file with this text."""
    def reader(text, written="utf-8", name="export.csv", **settings):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode(written))
        settings = {k: v for k, v in (GIVEN | settings).items() if v is not None}
        park = Park(OBJECTS, settings)
        return Reader(csv_layout.understand(path, settings, park), park)
    return reader


@pytest.fixture
def read(reader):
    """Return a function that gives {(object, feature): {time: value}} of a file, and a reader."""
    def read(*args, **settings):
        one, found = reader(*args, **settings), {}
        for piece in one.pieces():
            for key, samples in piece.samples.items():
                found.setdefault(key, {}).update({moment(t): v for t, v in samples.items()})
        return found, one
    return read


@pytest.fixture
def problems(reader):
    """Return a function that gives what is asked about a file."""
    def problems(*args, **settings):
        with pytest.raises(csv_layout.LayoutError) as refused:
            reader(*args, **settings)
        return refused.value.problems
    return problems


def utc(*parts):
    return datetime(*parts, tzinfo=UTC)


FIRST, SECOND_TIME = utc(2026, 3, 13, 0, 10), utc(2026, 3, 13, 0, 20)


@pytest.mark.parametrize(("text", "settings"), [
    pytest.param("time,wind_speed\n2026-03-13 00:10,5.5\n2026-03-13 00:20,6\n", {}, id="plain"),
    pytest.param("Time;Wind speed (m/s)\n13.03.2026 00:10;5,5\n13.03.2026 00:20;6\n", {},
                 id="Excel of half Europe"),
    pytest.param('"Date/Time","Wind Speed [m/s]"\r\n"03/13/2026 12:10 AM","5.5"\r\n'
                 '"03/13/2026 12:20 AM","6"\r\n', {}, id="American, quoted"),
    pytest.param("\ufeffTimestamp\twindspeed\n2026-03-13T00:10:00Z\t5.5\n"
                 "2026-03-13T00:20:00Z\t6.0\n", {}, id="tabs, ISO, mark of UTF-8"),
    pytest.param("time,wind_speed\n2026-03-13T01:10+01:00,5.5\n2026-03-12T20:20:00.000-0400,6\n",
                 {"zone": None}, id="offsets need no zone"),
    pytest.param("timestamp,wind_speed\n1773360600,5.5\n1773361200,6\n", {"zone": None},
                 id="seconds since 1970"),
    pytest.param("LAN\nn,timestamp,wind_speed\n1,1773360600,5.5\n2,1773361200,6\n", {"zone": None},
                 id="seconds since 1970 in another column"),
    pytest.param("timestamp,wind_speed\n1773360600000,5.5\n1773361200000,6\n", {"zone": None},
                 id="milliseconds since 1970"),
    pytest.param("Date;Clock;wind_speed\n13.03.2026;00:10;5,5\n13.03.2026;00:20;6,0\n", {},
                 id="date and clock in two columns"),
    pytest.param("time;wind_speed\n13-Mar-2026 00:10:00;5,5\n13-Mar-2026 00:20:00;6\n", {},
                 id="month by name"),
    pytest.param("time;wind_speed\n13-Mar-26 00:10;5,5\n13-Mar-26 00:20;6\n",
                 {"time": ["time"], "time_format": "%d-%b-%y %H:%M"}, id="a pattern"),
    pytest.param("Park LAN\nExported by someone\n\ntime;wind_speed;\n;m/s;\n"
                 "13.03.2026 00:10;5,5;\n13.03.2026 00:20;6;\n", {},
                 id="title, units below the heads, last delimiter"),
    pytest.param("2026-03-13 00:10,5.5\n2026-03-13 00:20,6\n", {"columns": {"2": "wind_speed"}},
                 id="no header"),
    pytest.param("time,wind_speed\n2026-03-13 00:20,6\n2026-03-13 00:10,5.5\n", {},
                 id="newest first"),
    pytest.param("time,tag,value\n2026-03-13 00:10,wind_speed,5.5\n2026-03-13 00:20,WindSpeed,6\n",
                 {"feature_column": "tag"}, id="a row per signal"),
    pytest.param("time,WS\n2026-03-13 00:10,5.5\n2026-03-13 00:20,6\n",
                 {"columns": {"WS": "wind_speed"}}, id="another name"),
    pytest.param("time,Turbine,wind_speed\n2026-03-13 00:10,LAN-1,5.5\n2026-03-13 00:20,lan 1,6\n",
                 {"object": None}, id="object in a column"),
    pytest.param("time,T01,wind_speed\n2026-03-13 00:10,A,5.5\n2026-03-13 00:20,A,6\n",
                 {"object": None, "object_column": "T01", "objects": {"A": "LAN-1"}},
                 id="object by another name"),
    pytest.param("time,LAN-1.Wind Speed (m/s)\n2026-03-13 00:10,5.5\n2026-03-13 00:20,6\n",
                 {"object": None}, id="object in the heads"),
    pytest.param("time,tag,value\n2026-03-13 00:10,LAN-1.WindSpeed,5.5\n"
                 "2026-03-13 00:20,LAN-1.WindSpeed,6\n",
                 {"object": None, "feature_column": "tag"}, id="object in the signal's name"),
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "cp1252"])
def test_the_same_two_samples(read, text, settings, encoding):
    text = text.lstrip("\ufeff") if encoding == "cp1252" else text
    found, one = read(text, encoding, **settings)
    assert found == {WIND: {FIRST: 5.5, SECOND_TIME: 6.0}}
    assert one.refused.lines == 0


def test_a_head_in_single_bytes_is_read(read):
    found, one = read("time;Wind°;wind_speed\n13.03.2026 00:10;1;5,5\n".encode("latin-1"))
    assert found == {WIND: {FIRST: 5.5}}
    assert list(one.skipped) == ["Wind°"]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n\n"])
def test_lines_may_end_in_any_way(read, end):
    found, one = read(end.join(["time,wind_speed", "2026-03-13 00:10,5.5", ""]))
    assert found == {WIND: {FIRST: 5.5}}
    assert one.refused.lines == 0


def test_a_cell_that_is_too_large_is_refused_by_its_line(read):
    text = f"time,wind_speed\n2026-03-13 00:10,{'5' * 200_000}\n2026-03-13 00:20,6\n"
    found, one = read(text)
    assert found == {WIND: {SECOND_TIME: 6.0}}
    assert [line for line, _ in one.refused.shown] == [2]


@pytest.mark.parametrize("name", ["LAN-10.csv", "scada_LAN-10_2026-03.csv", "lan-10 march.csv"])
def test_the_object_stands_in_the_files_name(read, name):
    found, _ = read("time,wind_speed\n2026-03-13 00:10,5.5\n", name=name, object=None)
    assert found == {(2, 1): {FIRST: 5.5}}


# ------------------------------------------------------------------------------------- asked for

AMBIGUOUS = "time,wind_speed\n03/04/2026 00:10,5.5\n"


PLAIN = "time,wind_speed\n2026-03-13 00:10,5.5\n2026-03-13 00:20,6\n"


@pytest.mark.parametrize(("text", "settings", "asked"), [
    pytest.param(AMBIGUOUS, {}, "'03/04/2026 00:10' day first or month first? No date in the file "
                 "tells: --time-format DMY or MDY", id="day or month"),
    pytest.param(AMBIGUOUS, {"time_format": "DMY", "zone": None}, "in which zone", id="zone"),
    pytest.param(AMBIGUOUS, {"time_format": "DMY", "stamps": None},
                 "--stamps start or --stamps end", id="start or end"),
    pytest.param(AMBIGUOUS, {"time_format": "DMY", "object": None}, "whose samples", id="object"),
    pytest.param(AMBIGUOUS, {"time_format": "D/M"}, "--time-format 'D/M'", id="unknown format"),
    pytest.param(AMBIGUOUS, {"time_format": "DMY", "zone": "Europe/Nowhere"}, "no time zone",
                 id="unknown zone"),
    pytest.param(AMBIGUOUS, {"object": "LAN-3", "time_format": "DMY"}, "no such object",
                 id="unknown object"),
    pytest.param("time;wind_speed\n13.03.2026;1.234\n", {}, "--decimal . or --decimal ,",
                 id="a thousand or one"),
    pytest.param('time,wind_speed\n2026-03-13,"1,234"\n', {}, "--decimal . or --decimal ,",
                 id="a thousand or one, quoted"),
    pytest.param("time;wind_speed;energy\n13.03.2026;1.5;2,5\n", {}, "--decimal . or --decimal ,",
                 id="both signs"),
    pytest.param("from,to,wind_speed\n2026-03-13 00:00,2026-03-13 00:10,5\n", {},
                 "which column is the time, 'from', 'to'? --time", id="two times"),
    pytest.param("a,b\n1,2\n", {}, "None looks like one", id="no time"),
    pytest.param("time,wind_speed\n13.03.26 00:10,5.5\n", {}, "--time", id="year of two digits"),
    pytest.param("time,WS\n2026-03-13 00:10,5.5\n", {}, "none of 'WS' is known as a feature",
                 id="unknown column"),
    pytest.param("time,WS\n2026-03-13 00:10,5.5\n", {"columns": {"WX": "wind_speed"}},
                 "there is no column 'WX'; the columns are 'time', 'WS'", id="column given wrong"),
    pytest.param("time,Wind speed (km/h)\n2026-03-13 00:10,5.5\n", {},
                 "in 'km/h', feature 'wind_speed' of LAN-1 in 'm/s'", id="another unit"),
    pytest.param("time,wind_speed,Wind Speed\n2026-03-13 00:10,5.5,6\n", {},
                 "two columns are the feature 'wind_speed'", id="a feature twice"),
    pytest.param("time,wind_speed\n2026-03-13 00:10,5\n", {"encoding": "utf-9"}, "utf-9",
                 id="unknown encoding"),
    pytest.param(PLAIN, {"encoding": "base64"}, "--encoding says another", id="no text encoding"),
    pytest.param(PLAIN, {"encoding": "utf-16"}, "--encoding says another", id="wrong encoding"),
    pytest.param(PLAIN, {"time_format": "%Y-%m-%d %Y"}, "'%Y-%m-%d %Y': no pattern of a time: ",
                 id="a pattern with a part twice"),
    pytest.param(PLAIN, {"time_format": "%Q"}, "'%Q': no pattern of a time: ", id="no pattern"),
    pytest.param("time,wind_speed,wind_speed\n2026-03-13 00:10,5.5,6\n", {},
                 "with --header 0 columns go by number, --column 2=wind_speed", id="a head twice"),
    pytest.param("", {}, "no row", id="empty"),
    pytest.param("time,wind_speed\n", {}, "no sample in it, only the row 'time', 'wind_speed'",
                 id="only a header"),
    pytest.param("wind_speed\n5\n6\n", {}, "one column only", id="one column"),
    pytest.param(gzip.compress(PLAIN.encode()), {}, "gunzip it first", id="gzip"),
    pytest.param(b"PK\3\4" + bytes(99), {}, "save or unpack it as CSV first", id="Excel"),
])
def test_what_nobody_can_tell_is_asked(problems, text, settings, asked):
    found = problems(text, **settings)
    assert len(found) == 1
    assert asked in found[0]


def test_of_a_head_that_stands_twice_one_column_is_taken(read):
    found, _ = read("time,wind_speed,wind_speed\n2026-03-13 00:10,5.5,6\n",
                    header=0, columns={"2": "wind_speed"})
    assert found == {WIND: {FIRST: 5.5}}


def test_zeros_of_a_logger_that_lost_power_are_a_line(read):
    found, one = read(PLAIN + "\0" * 500 + "\n2026-03-13 00:30,7\n")
    assert found[WIND] == {FIRST: 5.5, SECOND_TIME: 6.0, utc(2026, 3, 13, 0, 30): 7.0}
    assert one.refused.shown == [(4, "1 columns instead of 2")]


def test_a_given_object_and_another_in_the_file_do_not_go_together(read, problems):
    text = "time,turbine,wind_speed\n2026-03-13 00:10,{},5.5\n2026-03-13 00:20,LAN-2,6\n"
    found, one = read(text.format("LAN-1"))
    assert found == {WIND: {FIRST: 5.5}}
    assert one.refused.shown == [(3, "'turbine' says 'LAN-2', --object 'LAN-1'")]
    assert read(text.format("WTG 7").replace("LAN-2", "WTG 7"))[0] == {
        WIND: {FIRST: 5.5, SECOND_TIME: 6.0}}
    asked, = problems("time,wind_speed\n2026-03-13 00:10,5\n", name="LAN-2.csv")
    assert "--object 'LAN-1', but the file's name says LAN-2" in asked


def test_everything_is_asked_at_once(problems):
    assert len(problems(AMBIGUOUS, zone=None, stamps=None, object=None)) == 4


def test_a_later_date_tells_day_from_month(read):
    days = [f"{day:02}/03/2026 00:10,{day}\n" for day in range(1, 14)]
    found, _ = read("time,wind_speed\n" + "".join(days * 100))
    assert found[WIND][utc(2026, 3, 13, 0, 10)] == 13
    assert len(found[WIND]) == 13


def test_a_unit_that_is_said_to_be_right_is_believed(read):
    found, _ = read("time,Wind speed (km/h)\n2026-03-13 00:10,5.5\n",
                    columns={"Wind speed (km/h)": "wind_speed"})
    assert found == {WIND: {FIRST: 5.5}}


# ------------------------------------------------------------------------------ values, duplicates


@pytest.mark.parametrize(("cell", "value"), [
    ("", None), ("NaN", None), ("null", None), ("-999", None), ("-999,0", None), ("Bad", None),
    ("bad", None), ("-5", -5.0), ("1.234,5", 1234.5), ("1.234.567", 1234567.0), ("1e3", 1000.0),
    (" 7 ", 7.0), ("0", 0.0),
])
def test_a_cell_with_decimal_comma(read, cell, value):
    found, one = read(f"time;wind_speed;active_power\n13.03.2026 00:10;{cell};0,5\n",
                      none=["-999", "Bad"])
    assert found == {WIND: {FIRST: value}, POWER: {FIRST: 0.5}}
    assert one.refused.lines == 0


@pytest.mark.parametrize(("cell", "reason"), [
    ("Bad", "column 'wind_speed': 'Bad' is no number; --none 'Bad' if it stands for no value"),
    ("1_000", "'1_000' is no number"), ("inf", "'inf' is no number"), ("5 m/s", "no number"),
    ("1.5", "'1.5' has another decimal sign; --decimal"), ("1e999", "no number"),
])
def test_a_bad_value_is_refused_and_the_others_of_its_line_are_not(read, cell, reason):
    found, one = read(f"time;wind_speed;active_power\n13.03.2026 00:10;{cell};0,5\n", decimal=",")
    assert found == {POWER: {FIRST: 0.5}}
    (line, why), = one.refused.shown
    assert line == 2
    assert reason in why


def test_a_first_line_without_a_number_is_data_if_it_has_a_time(read):
    found, one = read("time,wind_speed\n2026-03-13 00:10,Bad\n2026-03-13 00:20,6\n")
    assert found == {WIND: {SECOND_TIME: 6.0}}
    assert [line for line, _ in one.refused.shown] == [2]
    found, _ = read("time,wind_speed\n13-Mar-26 00:10,\n13-Mar-26 00:20,6\n",
                    time="time", time_format="%d-%b-%y %H:%M")
    assert found == {WIND: {FIRST: None, SECOND_TIME: 6.0}}


@pytest.mark.parametrize(("line", "reason"), [
    ("32.03.2026 00:10;5,5;1", "'32.03.2026 00:10' is no time: day is out of range"),
    ("2026-03-13 00:10;5,5;1", "written as DD.MM.YYYY HH:MM but as YYYY-MM-DD"),
    ("yesterday;5,5;1", "'yesterday' is no time"), (";5,5;1", "'' is no time"),
    ("13.03.2026 00:10;5,5", "2 columns instead of 3"),
    ("13.03.2026 00:10;5,5;1;9", "4 columns instead of 3"),
    ("13.03.2026 25:10;5,5;1", "hour must be in 0..23"),
    ("13.03.1026 00:10;5,5;1", "1900 to 2999"), ("31.12.9999 24:00;5,5;1", "is no time"),
    ('13.03.2026 00:10;"5,5;1', "columns instead of 3"),
])
def test_a_bad_line_is_refused_by_its_number(read, line, reason):
    good = "time;wind_speed;active_power\n13.03.2026 00:10;5,5;1\n"
    found, one = read(good + line + "\n")
    assert found == {WIND: {FIRST: 5.5}, POWER: {FIRST: 1.0}}
    (number, why), = one.refused.shown
    assert number == 3
    assert reason in why


def test_lines_that_a_quotation_mark_swallows_are_counted(read):
    found, one = read("time,wind_speed,active_power\n2026-03-13 00:10,5.5,1\n"
                      '2026-03-13 00:20,"6,1\n2026-03-13 00:30,7,1\n2026-03-13 00:40,8,1\n')
    assert found == {WIND: {FIRST: 5.5}, POWER: {FIRST: 1.0}}
    assert one.refused.lines == 3
    (line, why), = one.refused.shown
    assert line == 5
    assert "with the 2 lines before it one row, by a quotation mark: 2 columns" in why


def test_ten_refused_lines_are_shown_and_all_are_counted(read):
    lines = "".join(f"13.03.2026 00:10;x{n};y{n}\n" for n in range(50))
    _, one = read("time;wind_speed;active_power\n13.03.2026 00:10;5,5;1\n" + lines)
    assert (one.refused.lines, len(one.refused.shown)) == (50, 10)


def test_of_samples_with_the_same_time_the_last_one_counts(reader):
    piece, = reader("time,wind_speed\n2026-03-13 00:10,1\n2026-03-13 00:20,2\n"
                    "2026-03-13 00:10,3\n").pieces()
    assert piece.read == 3
    assert list(piece.samples[WIND].values()) == [3.0, 2.0]


def test_unknown_objects_are_refused_unknown_signals_are_left_out(read):
    found, one = read("time,object,tag,value\n2026-03-13 00:10,LAN-1,wind_speed,5\n"
                      "2026-03-13 00:10,LAN-3,wind_speed,5\n2026-03-13 00:10,LAN-1,oil,5\n",
                      object=None, feature_column="tag")
    assert found == {WIND: {FIRST: 5.0}}
    assert one.refused.shown == [(3, "unknown object 'LAN-3'")]
    assert one.skipped == {"oil": 1}


# ------------------------------------------------------------------------------------------ times


def local(zone, texts, feature="wind_speed", stamps="end", reader=None):
    rows = "".join(f"{text},{n}\n" for n, text in enumerate(texts))
    key = 1, FEATURES[feature].id
    one = reader(f"time,{feature}\n{rows}", zone=zone, stamps=stamps)
    samples = [piece.samples[key] for piece in one.pieces()]
    return [moment(t) for piece in samples for t in piece], one


def test_an_hour_that_comes_twice_is_told_by_its_order(reader):
    clock = ["01:50", "02:00", "02:20", "02:40", "02:00", "02:20", "02:40", "03:00"]
    times, _ = local("Europe/Madrid", [f"2026-10-25 {c}" for c in clock], reader=reader)
    assert times == [utc(2026, 10, 24, 23, 50), utc(2026, 10, 25), utc(2026, 10, 25, 0, 20),
                     utc(2026, 10, 25, 0, 40), utc(2026, 10, 25, 1), utc(2026, 10, 25, 1, 20),
                     utc(2026, 10, 25, 1, 40), utc(2026, 10, 25, 2)]


def test_newest_first_the_first_pass_is_standard_time(reader):
    clock = ["03:00", "02:40", "02:00", "02:40", "02:00", "01:50"]
    times, _ = local("Europe/Madrid", [f"2026-10-25 {c}" for c in clock], reader=reader)
    assert times == [utc(2026, 10, 25, 2), utc(2026, 10, 25, 1, 40), utc(2026, 10, 25, 1),
                     utc(2026, 10, 25, 0, 40), utc(2026, 10, 25), utc(2026, 10, 24, 23, 50)]


@pytest.mark.parametrize(("feature", "count"), [("hourly", 4), ("wind_speed", 3)])
def test_the_same_time_again_is_the_second_pass_of_hourly_samples_only(reader, feature, count):
    clock = ["01:00", "02:00", "02:00", "03:00"]
    times, _ = local("Europe/Madrid", [f"2026-10-25 {c}" for c in clock], feature,
                     reader=reader)
    assert len(set(times)) == count


def test_each_object_has_its_own_passes(read):
    rows = "".join(f"2026-10-25 {clock},{name},1\n" for name in ("LAN-1", "LAN-2")
                   for clock in ("02:40", "02:00", "02:40"))
    found, _ = read(f"time,object,wind_speed\n{rows}", object=None, zone="Europe/Madrid")
    passes = {utc(2026, 10, 25, 0, 40), utc(2026, 10, 25, 1), utc(2026, 10, 25, 1, 40)}
    assert found[1, 1].keys() == found[3, 1].keys() == passes


def test_an_hour_that_the_clocks_skip_is_refused(reader):
    times, one = local("Europe/Madrid", ["2026-03-29 01:50", "2026-03-29 02:10",
                                               "2026-03-29 03:00"], reader=reader)
    assert times == [utc(2026, 3, 29, 0, 50), utc(2026, 3, 29, 1)]
    (line, why), = one.refused.shown
    assert line == 3
    assert "skip this hour" in why
    assert "--zone +01:00" in why


def test_a_fixed_offset_knows_no_daylight_saving(reader):
    times, one = local("+01:00", ["2026-03-29 01:50", "2026-03-29 02:10"], reader=reader)
    assert times == [utc(2026, 3, 29, 0, 50), utc(2026, 3, 29, 1, 10)]
    assert one.refused.lines == 0


MADRID = ZoneInfo("Europe/Madrid")


@pytest.mark.parametrize(("feature", "start", "end"), [
    ("wind_speed", "2026-03-29 01:50", datetime(2026, 3, 29, 3, tzinfo=MADRID)),
    ("hourly", "2026-10-25 01:00", datetime(2026, 10, 25, 2, tzinfo=MADRID)),
    ("energy", "2026-03-29 00:00", datetime(2026, 3, 30, tzinfo=MADRID)),   # 23 hours
    ("energy", "2026-10-25", datetime(2026, 10, 26, tzinfo=MADRID)),        # 25 hours
    ("bill", "2026-01-31", datetime(2026, 2, 28, tzinfo=MADRID)),
    ("bill", "2026-12-01", datetime(2027, 1, 1, tzinfo=MADRID)),
])
def test_a_stamp_at_the_start_moves_by_the_interval_in_the_calendar(reader, feature, start, end):
    times, _ = local("Europe/Madrid", [start], feature, "start", reader)
    assert times == [end.astimezone(UTC)]


def test_midnight_may_be_written_as_24_00(reader):
    times, one = local("UTC", ["2026-03-13 23:50", "2026-03-13 24:00", "2026-03-13 24:10"],
                       reader=reader)
    assert times == [utc(2026, 3, 13, 23, 50), utc(2026, 3, 14)]
    assert one.refused.lines == 1

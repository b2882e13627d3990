//! What every registry promises, as tests generic over the trait and run on SQLite and on etcd, and what SQLite's adds.

mod etcd_support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use etcd_support::Etcd;
use lockstep::registry::{
    CasError, Change, Event, Guard, Location, PRESENCE, Registry, RegistryError, Revision, Sqlite,
    VALUE_MAX, Watch, WatchError,
};

/// Generous: only a broken registry takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens one more handle to the same, at first empty, registry.
type Open<'a> = &'a (dyn Fn() -> Arc<dyn Registry> + Sync);

fn put(key: &str, value: &str) -> Change {
    Change {
        key: key.into(),
        value: Some(value.into()),
    }
}

fn delete(key: &str) -> Change {
    Change {
        key: key.into(),
        value: None,
    }
}

/// The next `n` events, batches checked to be whole revisions in order.
fn collect(watch: &Watch, n: usize) -> Vec<Event> {
    let deadline = Instant::now() + PATIENCE;
    let mut events: Vec<Event> = Vec::new();
    while events.len() < n {
        assert!(Instant::now() < deadline, "only {events:?}");
        if let Some(batch) = watch.next(Duration::from_millis(100)).unwrap() {
            if let (Some(last), Some(first)) = (events.last(), batch.first()) {
                assert!(first.revision > last.revision, "a revision was cut in two");
            }
            events.extend(batch);
        }
    }
    assert!(events.is_sorted_by_key(|e| e.revision));
    events
}

mod suite {
    use super::*;

    pub fn a_key_is_written_read_and_deleted_by_revision(open: Open) {
        let (a, b) = (open(), open());
        assert_eq!(a.get("k").unwrap(), None);
        let first = a.cas("k", None, Some(b"1")).unwrap();
        let entry = b.get("k").unwrap().unwrap();
        assert_eq!((entry.value.as_slice(), entry.revision), (&b"1"[..], first));
        let second = b.cas("k", Some(first), Some(b"2")).unwrap();
        assert!(second > first);
        match a.cas("k", Some(first), Some(b"3")) {
            Err(CasError::Conflict {
                key,
                found: Some(found),
            }) => {
                assert_eq!(key, "k");
                assert_eq!(
                    (found.value.as_slice(), found.revision),
                    (&b"2"[..], second)
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            a.cas("k", None, Some(b"3")),
            Err(CasError::Conflict { found: Some(_), .. })
        ));
        a.cas("k", Some(second), None).unwrap();
        assert_eq!(b.get("k").unwrap(), None);
        assert!(matches!(
            b.cas("k", Some(second), Some(b"3")),
            Err(CasError::Conflict { found: None, .. })
        ));
        // A key that comes again has a revision it never had.
        assert!(b.cas("k", None, Some(b"")).unwrap() > second);
        assert_eq!(a.get("k").unwrap().unwrap().value, b"");
    }

    pub fn a_transaction_happens_whole_or_not_at_all(open: Open) {
        let r = open();
        let a = r.cas("a", None, Some(b"1")).unwrap();
        let guards = [
            Guard {
                key: "a",
                expected: Some(a),
            },
            Guard {
                key: "b",
                expected: None,
            },
        ];
        let at = r
            .txn(&guards, &[put("b", "1"), put("c", "1"), delete("a")])
            .unwrap();
        assert_eq!(r.get("a").unwrap(), None);
        for key in ["b", "c"] {
            assert_eq!(r.get(key).unwrap().unwrap().revision, at);
        }
        assert!(matches!(
            r.txn(&guards, &[put("d", "1")]),
            Err(CasError::Conflict { key, found: None }) if key == "a"
        ));
        assert_eq!(r.get("d").unwrap(), None);
        // Deleting what is absent changes nothing.
        assert_eq!(r.txn(&[], &[delete("nothing")]).unwrap(), at);
    }

    pub fn a_listing_is_of_one_prefix_and_one_instant(open: Open) {
        let r = open();
        for key in ["v/1", "v/2", "v/2/x", "v", "w/1", "v%", "V/1", "v/ä"] {
            r.cas(key, None, Some(key.as_bytes())).unwrap();
        }
        let listing = r.list("v/").unwrap();
        let keys: Vec<&str> = listing.entries.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, ["v/1", "v/2", "v/2/x", "v/ä"]);
        assert_eq!(r.list("").unwrap().entries.len(), 8);
        assert!(r.list("absent/").unwrap().entries.is_empty());
        let newest = listing.entries.iter().map(|(_, e)| e.revision).max();
        assert!(listing.revision >= newest.unwrap());
    }

    pub fn a_watch_from_a_listing_misses_nothing(open: Open) {
        let (a, b) = (open(), open());
        a.cas("w/old", None, Some(b"")).unwrap();
        let listing = a.list("w/").unwrap();
        // Before the watch exists, after it does, through this handle and another, in and outside the prefix.
        let one = a.cas("w/1", None, Some(b"1")).unwrap();
        let watch = a.watch("w/", listing.revision).unwrap();
        let two = b
            .txn(&[], &[put("w/2", "2"), put("x", ""), delete("w/1")])
            .unwrap();
        a.cas("x/3", None, Some(b"")).unwrap();
        let three = b.cas("w/2", Some(two), Some(b"3")).unwrap();
        let events = collect(&watch, 4);
        let seen: Vec<_> = events
            .iter()
            .map(|e| (e.key.as_str(), e.revision, e.value.as_deref()))
            .collect();
        assert_eq!(
            seen,
            [
                ("w/1", one, Some(&b"1"[..])),
                ("w/2", two, Some(&b"2"[..])),
                ("w/1", two, None),
                ("w/2", three, Some(&b"3"[..])),
            ]
        );
        assert_eq!(watch.next(Duration::from_millis(150)).unwrap(), None);
    }

    /// Adders in threads with handles of their own: no update is lost, and every watch tells the same story.
    pub fn racing_writers_lose_no_update_and_watches_agree(open: Open) {
        const WRITERS: usize = 4;
        const ROUNDS: usize = 25;
        let r = open();
        let from = r.list("").unwrap().revision;
        let watches: Vec<(Arc<dyn Registry>, Watch)> = (0..2)
            .map(|_| {
                let handle = open();
                let watch = handle.watch("", from).unwrap();
                (handle, watch)
            })
            .collect();
        thread::scope(|s| {
            for _ in 0..WRITERS {
                s.spawn(|| {
                    let mine = open();
                    (0..ROUNDS).for_each(|_| add_one(&*mine, "sum"));
                });
            }
        });
        let sum = r.get("sum").unwrap().unwrap();
        assert_eq!(sum.value, (WRITERS * ROUNDS).to_string().as_bytes());
        let stories: Vec<Vec<Event>> = watches
            .iter()
            .map(|(_, w)| collect(w, WRITERS * ROUNDS))
            .collect();
        assert_eq!(stories[0], stories[1]);
        for (i, event) in stories[0].iter().enumerate() {
            assert_eq!(event.value.as_deref(), Some((i + 1).to_string().as_bytes()));
        }
    }

    /// A mirror kept by a watch equals a fresh listing once it has caught up.
    pub fn a_mirror_kept_by_a_watch_becomes_equal(open: Open) {
        let r = open();
        let listing = r.list("m/").unwrap();
        let watch = r.watch("m/", listing.revision).unwrap();
        thread::scope(|s| {
            for n in 0..3_u64 {
                s.spawn(move || {
                    let mine = open();
                    for i in 0..40_u64 {
                        let key = format!("m/{}", (i * 7 + n) % 10);
                        let change = if i % 3 == 2 {
                            delete(&key)
                        } else {
                            put(&key, &format!("{n}.{i}"))
                        };
                        mine.txn(&[], &[change]).unwrap();
                    }
                });
            }
        });
        let fresh = r.list("m/").unwrap();
        let mut mirror: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let deadline = Instant::now() + PATIENCE;
        let expected: BTreeMap<String, Vec<u8>> = fresh
            .entries
            .into_iter()
            .map(|(k, e)| (k, e.value))
            .collect();
        while mirror != expected {
            assert!(Instant::now() < deadline, "{mirror:?} is not {expected:?}");
            for event in watch
                .next(Duration::from_millis(50))
                .unwrap()
                .unwrap_or_default()
            {
                match event.value {
                    Some(value) => mirror.insert(event.key, value),
                    None => mirror.remove(&event.key),
                };
            }
        }
    }

    pub fn what_no_registry_could_hold_is_refused(open: Open) {
        let r = open();
        let big = vec![0; VALUE_MAX + 1];
        let long = "k".repeat(1000);
        assert!(r.cas("k", None, Some(&big)).is_err());
        assert!(r.cas(&long, None, Some(b"")).is_err());
        assert!(r.cas("", None, Some(b"")).is_err());
        assert!(r.cas("k", None, Some(&big[1..])).is_ok());
    }

    pub fn a_name_is_announced_until_it_is_withdrawn_and_is_no_record(open: Open) {
        let (a, b) = (open(), open());
        let names = |r: &dyn Registry| r.present().unwrap().names;
        let until = |what: &str, expected: &[&str]| {
            let begin = Instant::now();
            let expected = expected.iter().map(ToString::to_string).collect();
            while names(&*b) != expected {
                assert!(begin.elapsed() < PATIENCE, "{what}: {:?}", names(&*b));
                thread::sleep(Duration::from_millis(20));
            }
        };
        a.cas("k", None, Some(b"")).unwrap();
        let listing = b.list("").unwrap();
        let watch = b.watch("", listing.revision).unwrap();
        assert!(names(&*b).is_empty());
        // Given one name announced, and another one twice, by two handles,
        let n1 = a.announce("n1", PRESENCE).unwrap();
        let n2 = a.announce("n2.a", PRESENCE).unwrap();
        let again = b.announce("n2.a", PRESENCE).unwrap();
        until("both are announced", &["n1", "n2.a"]);
        // when they are withdrawn, each is there until the last who announced it has done so.
        drop(n1);
        until("one is withdrawn", &["n2.a"]);
        drop(n2);
        until("it is announced by the other", &["n2.a"]);
        drop(again);
        until("nobody is announced", &[]);
        let _back = b.announce("n1", PRESENCE).unwrap();
        until("it comes again", &["n1"]);
        // All this is no change of a record: none is listed, and a watch tells of the next true one at once.
        assert_eq!(b.list("").unwrap().entries, listing.entries);
        let at = a.cas("l", None, Some(b"")).unwrap();
        let events = collect(&watch, 1);
        assert_eq!((events[0].key.as_str(), events[0].revision), ("l", at));
        assert_eq!(events.len(), 1);
    }

    pub fn what_is_no_name_is_not_announced(open: Open) {
        let r = open();
        for bad in ["", "a/b", "../x", ".n1", &"n".repeat(500)] {
            assert!(r.announce(bad, PRESENCE).is_err(), "{bad}");
        }
        // Nor can a record look like an announcement.
        assert!(r.cas("alive/n1/1", None, Some(b"")).is_err());
        assert!(r.present().unwrap().names.is_empty());
    }

    pub fn add_one(registry: &dyn Registry, key: &str) {
        loop {
            let now = registry.get(key).unwrap();
            let n: u64 = now.as_ref().map_or(0, |e| {
                std::str::from_utf8(&e.value).unwrap().parse().unwrap()
            });
            let next = (n + 1).to_string();
            match registry.cas(key, now.map(|e| e.revision), Some(next.as_bytes())) {
                Ok(_) => return,
                Err(CasError::Conflict { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
    }
}

/// Runs each promise on a new SQLite file and on a new etcd.
macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            use super::*;
            $(
                #[test]
                fn $name() {
                    let dir = tempfile::tempdir().unwrap();
                    let path = dir.path().join("registry.db");
                    suite::$name(&|| Arc::new(Sqlite::open(&path).unwrap()));
                }
            )*
        }

        mod etcd {
            use super::*;
            $(
                #[test]
                fn $name() {
                    let etcd = Etcd::start(1);
                    suite::$name(&|| etcd.open());
                }
            )*
        }
    };
}

promises!(
    a_key_is_written_read_and_deleted_by_revision,
    a_transaction_happens_whole_or_not_at_all,
    a_listing_is_of_one_prefix_and_one_instant,
    a_watch_from_a_listing_misses_nothing,
    racing_writers_lose_no_update_and_watches_agree,
    a_mirror_kept_by_a_watch_becomes_equal,
    what_no_registry_could_hold_is_refused,
    a_name_is_announced_until_it_is_withdrawn_and_is_no_record,
    what_is_no_name_is_not_announced,
);

/// The other half of `processes_lose_no_update`: this test binary, run again with a file to write to.
const CHILD: &str = "LOCKSTEP_TEST_REGISTRY_CHILD";
const CHILD_ROUNDS: usize = 30;

#[test]
fn child_adds() {
    let Ok(path) = std::env::var(CHILD) else {
        return;
    };
    let registry = Sqlite::open(Path::new(&path)).unwrap();
    for _ in 0..CHILD_ROUNDS {
        suite::add_one(&registry, "sum");
    }
}

#[test]
fn processes_lose_no_update_and_a_killed_one_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let registry = Sqlite::open(&path).unwrap();
    let watch = registry.watch("", Revision(0)).unwrap();
    let spawn = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_adds"])
            .env(CHILD, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut victim = spawn();
    let children: Vec<_> = (0..3).map(|_| spawn()).collect();
    collect(&watch, 5);
    victim.kill().unwrap();
    victim.wait().unwrap();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let sum = registry.get("sum").unwrap().unwrap();
    let sum: usize = String::from_utf8(sum.value).unwrap().parse().unwrap();
    assert!(
        (3 * CHILD_ROUNDS..=4 * CHILD_ROUNDS).contains(&sum),
        "{sum}"
    );
    suite::add_one(&registry, "sum");
}

/// The other half of `a_process_that_is_killed_is_announced_no_more`: likewise.
const ANNOUNCER: &str = "LOCKSTEP_TEST_REGISTRY_ANNOUNCER";

#[test]
fn child_is_announced() {
    let Ok(path) = std::env::var(ANNOUNCER) else {
        return;
    };
    let registry = Sqlite::open(Path::new(&path)).unwrap();
    let _presence = registry.announce("n1", PRESENCE).unwrap();
    loop {
        thread::park();
    }
}

#[test]
fn a_process_that_is_killed_is_announced_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let registry = Sqlite::open(&path).unwrap();
    let until = |announced: bool| {
        let begin = Instant::now();
        while registry.present().unwrap().names.contains("n1") != announced {
            assert!(begin.elapsed() < PATIENCE, "announced: {}", !announced);
            thread::sleep(Duration::from_millis(20));
        }
    };
    let spawn = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_is_announced"])
            .env(ANNOUNCER, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = spawn();
    until(true);
    assert!(registry.present().unwrap().certain);
    // A process that stands still is one that may go on.
    let signal = |signal| {
        // SAFETY: a signal to a child that was not waited for yet: the number is its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
    };
    signal(libc::SIGSTOP);
    until(true);
    signal(libc::SIGKILL);
    child.wait().unwrap();
    assert!(registry.present().unwrap().names.is_empty());
    // What the dead one left is swept by the next of its name.
    let mut child = spawn();
    until(true);
    let left = fs::read_dir(dir.path().join("registry.db-alive")).unwrap();
    assert_eq!(left.count(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_watch_that_is_too_far_behind_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let registry = Sqlite::open(&path).unwrap();
    // Old history is cut after ten thousand revisions; their number is set instead of waited for.
    registry.cas("k", None, Some(b"")).unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE counters SET revision = 20479", [])
        .unwrap();
    registry.cas("j", None, Some(b"")).unwrap();
    let watch = registry.watch("", Revision(1)).unwrap();
    assert!(matches!(
        watch.next(PATIENCE),
        Err(WatchError::Compacted { from: Revision(1) })
    ));
    let listing = registry.list("").unwrap();
    assert_eq!(listing.revision, Revision(20_480));
    let watch = registry.watch("", listing.revision).unwrap();
    registry.cas("i", None, Some(b"")).unwrap();
    assert_eq!(collect(&watch, 1)[0].key, "i");
}

#[test]
fn many_may_open_a_new_file_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = dir.path().join(format!("{round}.db"));
        thread::scope(|s| {
            for _ in 0..6 {
                s.spawn(|| suite::add_one(&Sqlite::open(&path).unwrap(), "sum"));
            }
        });
        let sum = Sqlite::open(&path).unwrap().get("sum").unwrap().unwrap();
        assert_eq!(sum.value, b"6");
    }
}

#[test]
fn a_file_that_is_not_ours_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let unusable = |path: &Path, expected: &str| match Sqlite::open(path) {
        Err(RegistryError::Unusable { why, .. }) => assert!(why.contains(expected), "{why}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{} was opened", path.display()),
    };
    let garbage = dir.path().join("garbage.db");
    fs::write(&garbage, vec![b'x'; 8192]).unwrap();
    unusable(&garbage, "not a database");

    let other = dir.path().join("other.db");
    let raw = rusqlite::Connection::open(&other).unwrap();
    raw.execute_batch("CREATE TABLE t (x)").unwrap();
    unusable(&other, "another program");

    let newer = dir.path().join("newer.db");
    drop(Sqlite::open(&newer).unwrap());
    let raw = rusqlite::Connection::open(&newer).unwrap();
    raw.execute_batch("PRAGMA user_version = 99").unwrap();
    unusable(&newer, "version 99");

    unusable(&dir.path().join("absent/registry.db"), "directory");
    unusable(dir.path(), "directory");
}

#[test]
fn a_locked_registry_is_unavailable_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let registry = Sqlite::open(&path).unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(matches!(
        registry.cas("k", None, Some(b"")),
        Err(CasError::Registry(RegistryError::Unavailable { .. }))
    ));
    // Readers are not held up by a writer.
    assert_eq!(registry.get("k").unwrap(), None);
    raw.execute_batch("ROLLBACK").unwrap();
    registry.cas("k", None, Some(b"")).unwrap();
}

#[test]
fn a_location_is_read_back_from_its_text() {
    for good in [
        "sqlite:/var/lib/x.db",
        "etcd:http://10.0.0.1:2379",
        "etcd:https://a:2379,https://b:2379/blue",
    ] {
        let location: Location = good.parse().unwrap();
        assert_eq!(location.to_string(), good);
        assert_eq!(location.is_of_one_machine(), good.starts_with("sqlite:"));
    }
    for bad in [
        "",
        "sqlite:",
        "sqlite",
        "/var/lib/x.db",
        "redis:x",
        "etcd:",
        "etcd:10.0.0.1",
    ] {
        let error = bad.parse::<Location>().unwrap_err().to_string();
        assert!(
            error.contains("sqlite:PATH") && error.contains("etcd:http://"),
            "{error}"
        );
    }
    // A password that was put there by mistake is not shown again.
    let error = "etcd:http://u:secret@a".parse::<Location>().unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
}

//! The etcd registry when etcd is in trouble: members killed, stopped, restarted, compacted, guarded by passwords and TLS.

mod etcd_support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use etcd_support::{Etcd, PATIENCE, Pki, append, eventually};
use lockstep::registry::{
    Access, CasError, Event, Listing, Location, Registry, RegistryError, Revision, Watch,
    WatchError,
};

const WRITERS: usize = 4;
/// Swaps each writer makes at least.
const ROUNDS: usize = 40;
/// Members are killed until this many swaps ended in doubt, or a storm would prove nothing.
const DOUBTS: usize = 3;

fn tokens(registry: &dyn Registry, key: &str) -> Vec<String> {
    let entry = eventually("the registry answers", || registry.get(key).ok());
    let list = entry.map_or(Vec::new(), |e| e.value);
    let list = String::from_utf8(list).unwrap();
    list.split_whitespace().map(String::from).collect()
}

/// Writers swap without a pause while `hurt` does its worst, again and again; then every swap has happened exactly once.
fn storm(mut etcd: Etcd, mut hurt: impl FnMut(&mut Etcd)) {
    let registry = etcd.open();
    let (done, doubts) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut expected: Vec<String> = thread::scope(|s| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|w| {
                // Two with a connection of their own, two that share one.
                let mine = if w % 2 == 0 {
                    etcd.open()
                } else {
                    registry.clone()
                };
                let (done, doubts) = (&done, &doubts);
                s.spawn(move || {
                    let mut written = Vec::new();
                    while written.len() < ROUNDS || !done.load(SeqCst) {
                        let token = format!("{w}.{}", written.len());
                        doubts
                            .fetch_add(append(&*mine, &format!("list/{}", w / 2), &token), SeqCst);
                        written.push(token);
                    }
                    written
                })
            })
            .collect();
        let begin = Instant::now();
        while doubts.load(SeqCst) < DOUBTS {
            assert!(begin.elapsed() < PATIENCE, "no swap was ever in doubt");
            hurt(&mut etcd);
        }
        done.store(true, SeqCst);
        writers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect()
    });
    let mut found = tokens(&*registry, "list/0");
    found.extend(tokens(&*registry, "list/1"));
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Waits until the storm goes on, so that whatever is done next is done in the middle of it.
fn some_swaps_happen(etcd: &Etcd) {
    let registry = etcd.open();
    let count = || tokens(&*registry, "list/0").len() + tokens(&*registry, "list/1").len();
    let before = count();
    eventually("swaps go on", || (count() > before + 3).then_some(()));
}

#[test]
fn the_only_member_is_killed_amid_swaps_and_each_happens_exactly_once() {
    storm(Etcd::start(1), |etcd| {
        etcd.kill(1);
        etcd.start_member(1);
        some_swaps_happen(etcd);
    });
}

#[test]
fn leaders_are_killed_amid_swaps_and_each_happens_exactly_once() {
    storm(Etcd::start(3), |etcd| {
        let leader = etcd.leader();
        etcd.kill(leader);
        some_swaps_happen(etcd);
        etcd.start_member(leader);
        some_swaps_happen(etcd);
    });
}

#[test]
fn one_member_of_three_may_be_down_and_two_may_not() {
    // Given an etcd whose first member, as the location names them, is down from the beginning,
    let mut etcd = Etcd::start(3);
    etcd.kill(1);
    let registry = etcd.open();
    let one = eventually("one of three may be down", || {
        registry.cas("k", None, Some(b"1")).ok()
    });
    // when the member that answered goes down as well, then nobody can tell,
    etcd.kill(2);
    eventually("every member's trouble is named", || {
        match registry.get("k") {
            Err(RegistryError::Unavailable { why, .. }) => {
                (1..=3).all(|m| why.contains(&etcd.url(m))).then_some(())
            }
            other => panic!("{other:?}"),
        }
    });
    assert!(registry.cas("k", Some(one), Some(b"2")).is_err());
    // and when one of the two is back, everything goes on by itself.
    etcd.start_member(1);
    let now = eventually("two of three are enough", || registry.get("k").ok()).unwrap();
    assert_eq!((now.value.as_slice(), now.revision), (&b"1"[..], one));
}

#[test]
fn a_member_that_stands_still_costs_a_doubt_and_no_more() {
    // Given a client whose member stops in its tracks,
    let mut etcd = Etcd::start(3);
    let registry = etcd.open_at(&[1, 2, 3]);
    let one = registry.cas("k", None, Some(b"1")).unwrap();
    etcd.freeze(1);
    // when it swaps, then it cannot know,
    let doubt = registry.cas("k", Some(one), Some(b"2"));
    assert!(
        matches!(doubt, Err(CasError::Ambiguous { .. })),
        "{doubt:?}"
    );
    // another member tells it what is, and takes the next swap, as often as it takes to know;
    let next = eventually("another member swaps", || {
        let now = registry.get("k").ok()?.unwrap();
        match now.value.as_slice() {
            b"1" => registry.cas("k", Some(now.revision), Some(b"3")).ok(),
            b"3" => Some(now.revision),
            other => panic!("a member that stood still swapped to {other:?}"),
        }
    });
    // and what the first one still carries out when it wakes meets a guard that does not hold any more.
    etcd.thaw(1);
    let asleep = etcd.open_at(&[1]);
    let after = eventually("m1 answers", || asleep.get("k").ok()).unwrap();
    assert_eq!((after.value.as_slice(), after.revision), (&b"3"[..], next));
}

/// The next `n` events of a watch.
fn collect(watch: &Watch, n: usize) -> Vec<Event> {
    let begin = Instant::now();
    let mut events: Vec<Event> = Vec::new();
    while events.len() < n {
        assert!(begin.elapsed() < PATIENCE, "only {events:?}");
        events.extend(
            watch
                .next(Duration::from_millis(100))
                .unwrap()
                .unwrap_or_default(),
        );
    }
    events
}

fn compact(etcd: &Etcd, m: usize, at: Revision) {
    etcd.ok(m, &["compaction", &at.to_string()]);
}

#[test]
fn a_watch_lives_through_a_compaction() {
    let etcd = Etcd::start(1);
    let registry = etcd.open();
    let from = registry.list("").unwrap().revision;
    let watch = registry.watch("w/", from).unwrap();
    registry.cas("w/1", None, Some(b"")).unwrap();
    assert_eq!(collect(&watch, 1)[0].key, "w/1");
    let last = registry.cas("other", None, Some(b"")).unwrap();
    compact(&etcd, 1, last);
    registry.cas("w/2", None, Some(b"")).unwrap();
    assert_eq!(collect(&watch, 1)[0].key, "w/2");
}

#[test]
fn a_watch_whose_history_is_gone_is_told_and_goes_on_from_a_listing() {
    let etcd = Etcd::start(1);
    let registry = etcd.open();
    let from = registry.cas("w/1", None, Some(b"1")).unwrap();
    let two = registry.cas("w/1", Some(from), Some(b"2")).unwrap();
    let three = registry.cas("w/1", Some(two), Some(b"3")).unwrap();
    compact(&etcd, 1, three);
    let told = |from: Revision| {
        let watch = registry.watch("w/", from).unwrap();
        match watch.next(PATIENCE) {
            Err(WatchError::Compacted { from: at }) => at == from,
            Ok(batch) => panic!("{batch:?}"),
            Err(e) => panic!("{e}"),
        }
    };
    assert!(told(from));
    // One that stands beyond the end belongs to another history as well.
    assert!(told(Revision(three.0 + 1000)));
    let listing = registry.list("w/").unwrap();
    let watch = registry.watch("w/", listing.revision).unwrap();
    registry.cas("w/1", Some(three), None).unwrap();
    assert_eq!(collect(&watch, 1)[0].value, None);
}

#[test]
fn a_deletion_at_the_compacted_revision_is_not_overlooked() {
    // Given a watch that knows all but the last change, which deleted a key and to which etcd was compacted,
    let etcd = Etcd::start(1);
    let registry = etcd.open();
    let made = registry.cas("w/1", None, Some(b"1")).unwrap();
    let gone = registry.cas("w/1", Some(made), None).unwrap();
    compact(&etcd, 1, gone);
    registry.cas("w/2", None, Some(b"2")).unwrap();
    // then it hears of the deletion, or that it must list again; never only of what came later.
    let watch = registry.watch("w/", made).unwrap();
    match watch.next(PATIENCE) {
        Err(WatchError::Compacted { .. }) => {}
        Ok(Some(batch)) => assert_eq!((batch[0].revision, &batch[0].value), (gone, &None)),
        other => panic!("{other:?}"),
    }
}

type Map = BTreeMap<String, Vec<u8>>;

fn map(listing: Listing) -> Map {
    let entries = listing.entries.into_iter();
    entries.map(|(key, entry)| (key, entry.value)).collect()
}

/// What a control loop does: follows a watch into `mirror`, and lists again when it must. Gives how often it listed.
fn follow(registry: &dyn Registry, mirror: &Mutex<Map>, until: &AtomicBool) -> usize {
    let mut listed = 0;
    while !until.load(SeqCst) {
        let Ok(listing) = registry.list("m/") else {
            continue;
        };
        listed += 1;
        let mut at = listing.revision;
        *mirror.lock().unwrap() = map(listing);
        let Ok(watch) = registry.watch("m/", at) else {
            continue;
        };
        while let (false, Ok(batch)) = (until.load(SeqCst), watch.next(Duration::from_millis(50))) {
            for event in batch.into_iter().flatten() {
                assert!(event.revision > at, "told again: {event:?}");
                at = event.revision;
                let mut mirror = mirror.lock().unwrap();
                match event.value {
                    Some(value) => mirror.insert(event.key, value),
                    None => mirror.remove(&event.key),
                };
            }
        }
    }
    listed
}

#[test]
fn a_mirror_becomes_true_again_when_its_member_died_and_etcd_compacted() {
    // Given a mirror that knows one member of three, and a writer that knows the others,
    let mut etcd = Etcd::start(3);
    let (watcher, writer) = (etcd.open_at(&[1]), etcd.open_at(&[2, 3]));
    let (mirror, done) = (Mutex::default(), AtomicBool::new(false));
    let change = |i: u64| {
        let key = format!("m/{}", i % 7);
        eventually("a change is made", || {
            let now = writer.get(&key).ok()?;
            let next = (i % 3 != 2).then(|| i.to_string());
            let next = next.as_ref().map(String::as_bytes);
            writer.cas(&key, now.map(|e| e.revision), next).ok()
        })
    };
    let becomes_true = |mirror: &Mutex<Map>| {
        eventually("the mirror is true", || {
            let fresh = map(writer.list("m/").ok()?);
            (*mirror.lock().unwrap() == fresh).then_some(())
        });
    };
    let listed = thread::scope(|s| {
        let follower = s.spawn(|| follow(&*watcher, &mirror, &done));
        for i in 0..20 {
            change(i);
        }
        becomes_true(&mirror);
        // when its member dies, and changes are made and forgotten meanwhile,
        etcd.kill(1);
        let mut last = change(20);
        for i in 21..40 {
            last = change(i);
        }
        compact(&etcd, 2, last);
        // then it is true again in the end.
        etcd.start_member(1);
        for i in 40..60 {
            change(i);
        }
        becomes_true(&mirror);
        done.store(true, SeqCst);
        follower.join().unwrap()
    });
    assert!(listed > 1, "the compaction was never met");
}

#[test]
fn a_watch_resumes_on_another_member_without_a_gap_or_a_repetition() {
    let mut etcd = Etcd::start(3);
    let (watcher, writer) = (etcd.open_at(&[1, 2, 3]), etcd.open_at(&[3, 2]));
    let from = watcher.list("").unwrap().revision;
    let watch = watcher.watch("w/", from).unwrap();
    let add = |i: usize| {
        eventually("a change is made", || {
            match writer.cas(&format!("w/{i}"), None, Some(b"")) {
                Ok(at) => Some(at),
                // An earlier attempt had been carried out.
                Err(CasError::Conflict { found, .. }) => found.map(|e| e.revision),
                Err(_) => None,
            }
        })
    };
    let mut expected: Vec<Revision> = (0..5).map(add).collect();
    assert_eq!(collect(&watch, 5).len(), 5);
    let told = |n| -> Vec<Revision> { collect(&watch, n).iter().map(|e| e.revision).collect() };
    // The member that it listens to dies,
    etcd.kill(1);
    expected.extend((5..10).map(add));
    assert_eq!(told(5), expected[5..10]);
    // and, when that one is back, another stops in its tracks: nothing is heard, not even that the connection ended.
    etcd.start_member(1);
    etcd.await_member(1);
    etcd.freeze(2);
    expected.extend((10..15).map(add));
    assert_eq!(told(5), expected[10..15]);
}

/// A file with `USER:PASSWORD` for us alone.
/// Waits until the names announced are these.
fn announced(registry: &dyn Registry, what: &str, expected: &[&str]) {
    eventually(what, || {
        let names = registry.present().ok()?.names;
        (names
            .iter()
            .map(String::as_str)
            .eq(expected.iter().copied()))
        .then_some(())
    });
}

/// The shortest that etcd has time for; the tests wait for its end.
const TTL: Duration = Duration::from_secs(3);

/// The other half of `a_lease_ends_with_its_process`: this test binary, run again with an etcd to be announced in.
const ANNOUNCER: &str = "LOCKSTEP_TEST_ETCD_ANNOUNCER";

#[test]
fn child_is_announced() {
    let Ok(location) = std::env::var(ANNOUNCER) else {
        return;
    };
    let location: Location = location.parse().unwrap();
    let registry = location.open(&Access::default()).unwrap();
    let _presence = registry.announce("n1", TTL).unwrap();
    loop {
        thread::park();
    }
}

#[test]
fn a_lease_ends_with_its_process_whatever_ended_it() {
    let etcd = Etcd::start(1);
    let registry = etcd.open();
    let spawn = || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_is_announced"])
            .env(ANNOUNCER, etcd.location(&[1]))
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = spawn();
    announced(&*registry, "the child is announced", &["n1"]);
    assert!(!registry.present().unwrap().certain);
    // It is renewed: three lives of the lease later the key is the same, put once.
    let keys = || {
        etcd.ok(
            1,
            &[
                "get",
                "--prefix",
                "/lockstep/default/alive/",
                "-w",
                "fields",
            ],
        )
    };
    let before: Vec<String> = versions(&keys());
    thread::sleep(3 * TTL);
    assert_eq!(versions(&keys()), before);
    assert!(
        before.iter().any(|line| line.contains("\"Version\" : 1")),
        "{before:?}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    announced(&*registry, "its lease has ended", &[]);
    // Who ends in order is not waited for.
    let presence = registry.announce("n2", 1000 * TTL).unwrap();
    announced(&*registry, "n2 is announced", &["n2"]);
    drop(presence);
    announced(&*registry, "n2 is withdrawn", &[]);
}

/// What tells whether a key was written again.
fn versions(fields: &str) -> Vec<String> {
    let lines = fields.lines().filter(|line| {
        ["\"Key\"", "\"ModRevision\"", "\"Version\"", "\"Lease\""]
            .iter()
            .any(|field| line.starts_with(field))
    });
    lines.map(String::from).collect()
}

#[test]
fn an_announcement_survives_a_member_and_comes_back_after_etcd_was_away_for_long() {
    let mut etcd = Etcd::start(3);
    let announcer = etcd.open();
    let _presence = announcer.announce("n1", TTL).unwrap();
    let registry = etcd.open_at(&[3, 2, 1]);
    announced(&*registry, "n1 is announced", &["n1"]);
    // The member that the announcer talks to dies, and with luck the leader: the lease is renewed by another one.
    etcd.kill(1);
    thread::sleep(3 * TTL);
    announced(&*registry, "n1 is still announced", &["n1"]);
    etcd.start_member(1);
    etcd.await_member(1);
    // All are away for longer than the lease lives. etcd starts it anew when it comes back, so it is ended by hand, as it
    // ends while its holder alone is cut off.
    let lease = etcd.ok(2, &["lease", "list"]);
    let lease = lease.split_whitespace().last().unwrap().to_string();
    etcd.ok(2, &["lease", "revoke", &lease]);
    etcd.kill_all();
    thread::sleep(2 * TTL);
    etcd.restart_all();
    announced(&*registry, "n1 is announced again", &["n1"]);
    let leases = etcd.ok(1, &["lease", "list"]);
    assert!(!leases.contains(&lease), "{leases}");
}

fn credentials(dir: &Path, text: &str) -> Access {
    Access {
        credentials: Some(etcd_support::credentials(dir, text)),
        ..Access::default()
    }
}

#[test]
fn a_user_and_password_are_shown_where_etcd_asks_for_them() {
    let mut etcd = Etcd::start(1);
    let dir = tempfile::tempdir().unwrap();
    let stranger = etcd.open();
    // A client that has a password works with an etcd that does not ask for one,
    let access = credentials(dir.path(), "lockstep:secret:1\n");
    let ours = etcd.open_with(&[1], &access).unwrap();
    let one = ours.cas("k", None, Some(b"1")).unwrap();
    // and still does when it begins to.
    etcd.guard("lockstep:secret:1");
    let open = |access: &Access| etcd.open_with(&[1], access);
    etcd.ok(
        1,
        &["user", "add", "nobody", "--new-user-password", "secret"],
    );
    let two = ours.cas("k", Some(one), Some(b"2")).unwrap();
    let watch = ours.watch("", one).unwrap();
    assert_eq!(collect(&watch, 1)[0].revision, two);
    // A right to our keys is enough to be announced.
    let _presence = ours.announce("n1", TTL).unwrap();
    announced(&*ours, "a user is announced", &["n1"]);
    // Whoever shows nothing, a wrong password, or has no right to our keys, is told what to do.
    let refused = |registry: &dyn Registry, part: &str| {
        match registry.get("k") {
            Err(RegistryError::Unusable { why, .. }) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        }
        match registry.cas("k", None, Some(b"")) {
            Err(CasError::Registry(RegistryError::Unusable { why, .. })) => {
                assert!(why.contains(part), "{why}");
            }
            other => panic!("{other:?}"),
        }
    };
    refused(&*stranger, "--etcd-credentials");
    let other = tempfile::tempdir().unwrap();
    refused(
        &*open(&credentials(other.path(), "nobody:secret")).unwrap(),
        "grant-permission ROLE --prefix=true readwrite /lockstep/default/",
    );
    refused(
        &*open(&credentials(other.path(), "lockstep:wrong")).unwrap(),
        "user 'lockstep' of",
    );
    // A member that restarts has forgotten who we were: that is not our reader's business.
    etcd.kill(1);
    etcd.start_member(1);
    etcd.await_member(1);
    let three = eventually("it logs in again", || {
        ours.cas("k", Some(two), Some(b"3")).ok()
    });
    assert_eq!(collect(&watch, 1)[0].revision, three);
    thread::sleep(2 * TTL);
    announced(&*ours, "the user is still announced", &["n1"]);
}

#[test]
fn tls_proves_each_side_to_the_other() {
    let pki = Pki::new();
    let etcd = Etcd::start_tls(1, &pki);
    let access = |dir: &Path| Access {
        tls_dir: Some(dir.into()),
        ..Access::default()
    };
    // Given certificates of the same authority, everything works.
    let client = pki.directory("client", "etcd", vec!["lockstep".into()]);
    let registry = etcd.open_with(&[1], &access(&client)).unwrap();
    let at = registry.cas("k", None, Some(b"1")).unwrap();
    assert_eq!(registry.get("k").unwrap().unwrap().revision, at);
    // An etcd that somebody else vouches for is not believed,
    let other = Pki::new().directory("client", "etcd", vec!["lockstep".into()]);
    let dir = tempfile::tempdir().unwrap();
    let stranger = dir.path().join("stranger");
    fs::create_dir(&stranger).unwrap();
    drop(other);
    fs::write(stranger.join("etcd-ca.pem"), Pki::new().ca.pem()).unwrap();
    let registry = etcd.open_with(&[1], &access(&stranger)).unwrap();
    match registry.get("k") {
        Err(RegistryError::Unusable { why, .. }) => {
            assert!(why.contains("TLS") && why.contains(&etcd.url(1)), "{why}");
        }
        other => panic!("{other:?}"),
    }
    // without a certificate we are not,
    let bare = dir.path().join("bare");
    fs::create_dir(&bare).unwrap();
    fs::copy(client.join("etcd-ca.pem"), bare.join("ca.pem")).unwrap();
    assert!(
        etcd.open_with(&[1], &access(&bare))
            .unwrap()
            .get("k")
            .is_err()
    );
    // and half of what is needed is said before anybody connects.
    for (dir, part) in [(None, "--tls-dir"), (Some(dir.path()), "etcd-ca.pem")] {
        let access = dir.map_or_else(Access::default, access);
        match etcd.open_with(&[1], &access).err() {
            Some(RegistryError::Unusable { why, .. }) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    fs::copy(client.join("etcd.pem"), bare.join("etcd.pem")).unwrap();
    match etcd.open_with(&[1], &access(&bare)).err() {
        Some(RegistryError::Unusable { why, .. }) => assert!(why.contains("only one"), "{why}"),
        other => panic!("{other:?}"),
    }
    // Plain text to a port that speaks TLS.
    let plain: Location = etcd
        .location(&[1])
        .replace("https", "http")
        .parse()
        .unwrap();
    match plain.open(&Access::default()).unwrap().get("k") {
        Err(RegistryError::Unavailable { why, .. }) => assert!(why.contains("not https:"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_etcd_that_is_full_leaves_no_doubt_and_works_again_when_it_has_room() {
    let etcd = Etcd::start_with(1, "http", &["--quota-backend-bytes=16777216".into()]);
    let registry = etcd.open();
    let mut at = registry.cas("k", None, Some(b"")).unwrap();
    let value = |i: u8| vec![i; 1 << 20];
    // Given swaps until etcd is full,
    let (i, why) = (1..100)
        .find_map(|i| match registry.cas("k", Some(at), Some(&value(i))) {
            Ok(now) => {
                at = now;
                None
            }
            Err(CasError::Ambiguous { why }) => Some((i, why)),
            Err(e) => panic!("{e}"),
        })
        .expect("it is full at last");
    // then whoever swaps is told what to do, and reads what is.
    assert!(why.contains("alarm disarm"), "{why}");
    let now = registry.get("k").unwrap().unwrap();
    assert!(now.value == value(i) || now.value == value(i - 1) && now.revision == at);
    // When etcd has room again, so have we.
    compact(&etcd, 1, now.revision);
    etcd.ok(1, &["defrag"]);
    etcd.ok(1, &["alarm", "disarm"]);
    eventually("there is room", || {
        registry.cas("k", Some(now.revision), Some(b"")).ok()
    });
}

#[test]
fn two_clusters_share_one_etcd_under_different_names() {
    let etcd = Etcd::start(1);
    let open = |name: &str| {
        let location: Location = format!("{}{name}", etcd.location(&[1])).parse().unwrap();
        location.open(&Access::default()).unwrap()
    };
    let (one, two) = (open(""), open("/two"));
    one.cas("k", None, Some(b"1")).unwrap();
    two.cas("k", None, Some(b"2")).unwrap();
    assert_eq!(one.list("").unwrap().entries.len(), 1);
    assert_eq!(two.get("k").unwrap().unwrap().value, b"2");
    let keys = etcd.ok(1, &["get", "--prefix", "/lockstep/", "--keys-only"]);
    let keys: Vec<&str> = keys.split_whitespace().collect();
    assert_eq!(keys, ["/lockstep/default/k", "/lockstep/two/k"]);
}

/// Somebody on a port who is no etcd: reads a little, says `words`, hangs up.
fn impostor(words: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.120.251.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(words);
        }
    });
    format!("etcd:http://{address}")
}

#[test]
fn whoever_is_no_etcd_is_named_and_does_no_harm() {
    // An HTTP/1 server, an HTTP/2 frame longer than allowed, a SETTINGS frame and the end, and nothing at all.
    let words: [&'static [u8]; 4] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        &[0xff; 4096],
        &[0, 0, 0, 4, 0, 0, 0, 0, 0],
        b"",
    ];
    for words in words {
        let text = impostor(words);
        let location: Location = text.parse().unwrap();
        let registry = location.open(&Access::default()).unwrap();
        match registry.get("k") {
            Err(RegistryError::Unavailable { registry, why }) => {
                assert!(
                    registry == text && why.contains("http://127.120.251.1"),
                    "{why}"
                );
            }
            other => panic!("{other:?}"),
        }
        match registry.cas("k", None, Some(b"")) {
            Err(CasError::Registry(RegistryError::Unavailable { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
}

use proptest::prelude::*;

use crate::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};
use crate::wire::WireError;
use crate::wire::hello::{
    Answer, GREETING_MAX, Hello, HelloAck, HelloRefusal, Purpose, Reason, VERSIONS, Versions,
};

pub fn hello() -> Hello {
    Hello {
        versions: Versions { min: 1, max: 1 },
        features: 0x0102_0304_0506_0708,
        cluster: ClusterId(*b"cluster-cluster-"),
        node: NodeName("n1".into()),
        boot_id: BootId(*b"boot of a kernel"),
        instance: Instance(*b"process instance"),
        volume: VolumeId(*b"one single volum"),
        copy: CopyId(*b"copy of the node"),
        purpose: Purpose::Bulk,
    }
}

pub fn ack() -> HelloAck {
    HelloAck {
        version: 1,
        features: 0,
        cluster: ClusterId(*b"cluster-cluster-"),
        node: NodeName("n2".into()),
        boot_id: BootId(*b"boot of a kernel"),
        instance: Instance(*b"process instance"),
        credits: 1024,
    }
}

fn bytes(answer: &Answer) -> Vec<u8> {
    let mut out = Vec::new();
    answer.encode(&mut out);
    out
}

fn hello_bytes(hello: &Hello) -> Vec<u8> {
    let mut out = Vec::new();
    hello.encode(&mut out);
    out
}

/// Makes length and CRC of a greeting right again.
fn seal(greeting: &mut [u8]) {
    let len = greeting.len();
    greeting[10..12].copy_from_slice(&(len as u16).to_le_bytes());
    let crc = crc32c::crc32c(&greeting[..len - 4]);
    greeting[len - 4..].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn greetings_come_back_and_leave_what_follows_alone() {
    for purpose in [Purpose::Foreground, Purpose::Bulk] {
        let sent = Hello { purpose, ..hello() };
        let mut stream = hello_bytes(&sent);
        let len = stream.len();
        stream.extend(b"frames");
        assert_eq!(Hello::decode(&stream), Ok(Some((sent, len))));
    }
    let reasons = [
        Reason::WrongCluster,
        Reason::NoCommonVersion,
        Reason::UnknownCopy,
        Reason::NotThisNode,
        Reason::Busy,
        Reason::Unproven,
        Reason::Other(600),
    ];
    let refusals = reasons.map(|r| Answer::Refusal(HelloRefusal::new(r, "words")));
    let named = HelloRefusal::new(Reason::UnknownCopy, "words").by(&NodeName("n2".into()));
    let others = [Answer::Ack(ack()), Answer::Refusal(named)];
    for answer in refusals.into_iter().chain(others) {
        let sent = bytes(&answer);
        assert_eq!(Answer::decode(&sent), Ok(Some((answer, sent.len()))));
    }
}

#[test]
fn versions_meet_at_the_newest_that_both_speak() {
    let v = |min, max| Versions { min, max };
    assert_eq!(v(1, 3).common(v(2, 5)), Some(3));
    assert_eq!(v(4, 4).common(v(2, 5)), Some(4));
    assert_eq!(v(1, 2).common(v(3, 5)), None);
    assert_eq!(v(5, 2).common(v(1, 9)), None);
}

#[test]
fn a_hello_of_another_version_is_told_apart_whatever_else_it_says_and_the_refusal_names_both_ranges()
 {
    let mut strange = hello_bytes(&hello());
    strange.truncate(24);
    strange.extend(b"fields nobody here knows");
    strange[12..16].copy_from_slice(&[7, 0, 9, 0]);
    seal(&mut strange);
    let theirs = Versions { min: 7, max: 9 };
    assert_eq!(
        Hello::decode(&strange),
        Err(WireError::Versions {
            theirs,
            ours: VERSIONS
        })
    );
    let refusal = HelloRefusal::no_common_version(theirs);
    assert!(refusal.text.contains("7..=9") && refusal.text.contains(&VERSIONS.to_string()));
    assert_eq!(
        (refusal.reason, refusal.versions),
        (Reason::NoCommonVersion, VERSIONS)
    );
}

#[test]
fn greetings_of_later_versions_with_fields_to_come_are_read() {
    let mut later = hello_bytes(&Hello {
        versions: Versions { min: 1, max: 4 },
        ..hello()
    });
    later.truncate(later.len() - 4);
    later.extend([0xaa; 54]);
    seal(&mut later);
    let (found, len) = Hello::decode(&later).unwrap().unwrap();
    assert_eq!(
        (found.versions.max, found.node, len),
        (4, hello().node, later.len())
    );
    let mut refusal = bytes(&Answer::Refusal(HelloRefusal {
        versions: Versions { min: 8, max: 9 },
        reason: Reason::NoCommonVersion,
        text: "too old".into(),
        node: None,
    }));
    refusal.truncate(refusal.len() - 4);
    refusal.extend([0xbb; 30]);
    seal(&mut refusal);
    let Answer::Refusal(found) = Answer::decode(&refusal).unwrap().unwrap().0 else {
        panic!()
    };
    assert_eq!((found.text.as_str(), found.versions.min), ("too old", 8));
    assert_eq!(found.node, None, "what comes there is no name");
}

#[test]
fn an_ack_that_chose_a_version_not_spoken_here_is_refused() {
    let chosen = bytes(&Answer::Ack(HelloAck {
        version: 2,
        ..ack()
    }));
    assert!(matches!(
        Answer::decode(&chosen),
        Err(WireError::Versions { .. })
    ));
}

#[test]
fn a_length_beyond_the_limit_or_below_the_least_is_refused_from_the_prefix() {
    let mut prefix = hello_bytes(&hello())[..24].to_vec();
    prefix[10..12].copy_from_slice(&(GREETING_MAX as u16 + 1).to_le_bytes());
    assert!(matches!(
        Hello::decode(&prefix),
        Err(WireError::TooLong { .. })
    ));
    prefix[10..12].copy_from_slice(&27u16.to_le_bytes());
    assert!(matches!(
        Hello::decode(&prefix),
        Err(WireError::Malformed(_))
    ));
}

#[test]
fn questions_and_answers_are_not_taken_for_each_other() {
    assert!(matches!(
        Answer::decode(&hello_bytes(&hello())),
        Err(WireError::Malformed(_))
    ));
    assert!(matches!(
        Hello::decode(&bytes(&Answer::Ack(ack()))),
        Err(WireError::Malformed(_))
    ));
    assert_eq!(
        Hello::decode(b"GET / HTTP"),
        Err(WireError::Magic(*b"GET "))
    );
    assert_eq!(
        Hello::decode(b"\x16\x03"),
        Err(WireError::Magic([0x16, 3, 0, 0]))
    );
}

#[test]
fn a_long_refusal_is_clipped_and_the_longest_greeting_fits() {
    let Answer::Refusal(found) = Answer::decode(&bytes(&Answer::Refusal(HelloRefusal::new(
        Reason::Busy,
        "x".repeat(5000),
    ))))
    .unwrap()
    .unwrap()
    .0
    else {
        panic!()
    };
    assert_eq!(found.text.len(), 256);
    let longest = Hello {
        node: NodeName("n".repeat(256)),
        ..hello()
    };
    let sent = hello_bytes(&longest);
    assert!(sent.len() <= GREETING_MAX);
    assert_eq!(Hello::decode(&sent).unwrap().unwrap().0, longest);
}

#[test]
fn a_greeting_cut_anywhere_asks_for_more_and_a_flipped_bit_is_never_believed() {
    for sent in [hello_bytes(&hello()), bytes(&Answer::Ack(ack()))] {
        let read = |b: &[u8]| match sent[8] {
            1 => Hello::decode(b).map(|f| f.is_some()),
            _ => Answer::decode(b).map(|f| f.is_some()),
        };
        for cut in 0..sent.len() {
            assert_eq!(read(&sent[..cut]), Ok(false));
        }
        for bit in 0..sent.len() * 8 {
            let mut flipped = sent.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // A changed length may ask for bytes that do not come: the handshake has a time limit.
            assert_ne!(read(&flipped), Ok(true), "bit {bit}");
        }
    }
}

proptest! {
    #[test]
    fn noise_behind_a_good_start_is_never_a_panic(kind in 0u8..5, tail in prop::collection::vec(any::<u8>(), 20..400)) {
        let mut greeting = b"lockstep".to_vec();
        greeting.extend([kind, 0]);
        greeting.extend(&tail);
        greeting[12..16].copy_from_slice(&[1, 0, 1, 0]);
        seal(&mut greeting);
        let _ = (Hello::decode(&greeting), Answer::decode(&greeting));
    }
}

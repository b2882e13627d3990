//! Who speaks to a node's replication port and is not one of its cluster is told so, and harms nobody.

mod cluster_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, PATIENCE};
use lockstep::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName};
use lockstep::wire::hello::{Answer, Hello, HelloRefusal, Purpose, Reason, Versions};

/// Greets a node and reads its answer.
fn greet(address: &str, hello: &Hello) -> HelloRefusal {
    let mut bytes = Vec::new();
    hello.encode(&mut bytes);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let whole = Answer::decode(&answer).unwrap();
    match whole.unwrap_or_else(|| panic!("only {answer:02x?}")).0 {
        Answer::Refusal(refusal) => refusal,
        Answer::Ack(ack) => panic!("it was let in: {ack:?}"),
    }
}

#[test]
fn strangers_are_refused_readably_and_the_load_goes_on() {
    // Given a volume with a replica under load,
    let cluster = Cluster::start_in(Path::new("/dev/shm"), 2);
    let create = "--size 32MiB --replicas 1 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(32 << 20));
    load.goes_on();
    let volume = cluster.volume(1, "vm1")["id"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let status = cluster.json(1, "cluster status");
    let cluster_id: ClusterId = status["id"].as_str().unwrap().parse().unwrap();
    let hello = Hello {
        versions: Versions { min: 1, max: 1 },
        features: 0,
        cluster: cluster_id,
        node: NodeName("stranger".into()),
        boot_id: BootId([1; 16]),
        instance: Instance([2; 16]),
        volume,
        copy: CopyId([3; 16]),
        purpose: Purpose::Foreground,
    };
    // when a node of another cluster comes, it is told both clusters;
    let other = ClusterId([9; 16]);
    let refusal = greet(
        &cluster.listen(2),
        &Hello {
            cluster: other,
            ..hello.clone()
        },
    );
    assert_eq!(refusal.reason, Reason::WrongCluster);
    assert!(
        refusal.text.contains(&other.to_string()),
        "{}",
        refusal.text
    );
    // one that asks for a copy that is not there, that it is not there;
    let refusal = greet(&cluster.listen(2), &hello);
    assert_eq!(refusal.reason, Reason::UnknownCopy);
    // one of a later version, which versions the node speaks;
    let later = Versions { min: 7, max: 9 };
    let refusal = greet(
        &cluster.listen(2),
        &Hello {
            versions: later,
            ..hello
        },
    );
    assert_eq!(refusal.reason, Reason::NoCommonVersion);
    assert_eq!(refusal.versions, Versions { min: 1, max: 1 });
    // and nonsense ends the connection.
    let mut stream = TcpStream::connect(cluster.listen(2)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let ended = stream.read(&mut [0; 64]);
    assert!(matches!(ended, Ok(0)) || ended.is_err(), "{ended:?}");
    // Then the volume has not noticed.
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    assert_eq!(cluster.volume(1, "vm1")["health"], "healthy");
}

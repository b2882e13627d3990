//! Several nodes over one registry: creation, attachment, change and removal as their users and failures see them.

mod mgmt_support;

use std::fs;
use std::thread;

use hyper::Method;
use lockstep::cluster::fault::Code;
use lockstep::cluster::host::{HostError, Phase};
use lockstep::cluster::store::Registrar;
use lockstep::registry::{Registry, Sqlite};
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::record::{CopyStatus, State};
use mgmt_support::{Lab, Node, eventually};
use serde_json::json;

fn attach(node: &Node, name: &str) -> serde_json::Value {
    let (status, body) = node.post(&format!("/api/v1/volumes/default/{name}/attach"), json!({}));
    assert_eq!(status, 200, "{body}");
    body
}

#[test]
fn a_volume_is_created_with_a_copy_on_each_chosen_node() {
    let lab = Lab::new();
    let nodes: [Node; 3] = lab.nodes();
    let (status, created) = nodes[0].create("vm1", 2);
    assert_eq!(status, 200, "{created}");
    let id = nodes[2].volume_id("vm1");
    for node in &nodes {
        assert_eq!(lab.copies(&node.name), [id.to_string()]);
    }
    let (record, _) = nodes[1].store.get_record(id).unwrap().unwrap();
    assert_eq!(record.state, State::Clean);
    assert_eq!(record.in_sync().count(), 3);
    assert!(record.copies.iter().all(|c| c.boot_id.is_some()));
    assert_eq!(record.lineage.len(), 1);
    let view = nodes[1].volume("vm1");
    assert_eq!(view["health"], "healthy", "{view}");
    assert_eq!(view["replicas_in_sync"], 2);

    let (status, fault) = nodes[1].create("vm1", 0);
    assert_eq!((status, fault["code"].as_str()), (409, Some("exists")));
}

#[test]
fn a_volume_without_room_for_its_copies_leaves_nothing_and_each_node_is_named() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[1].host.levers.lock().unwrap().free = Some(5);
    let (status, fault) = nodes[0].create("vm1", 2);
    assert_eq!(status, 409, "{fault}");
    let message = fault["message"].as_str().unwrap();
    assert!(message.contains("3 copies need 3 nodes"), "{message}");
    assert!(message.contains("n2: its disk is full"), "{message}");
    assert_eq!(nodes[0].get("/api/v1/volumes"), json!([]));
}

#[test]
fn a_node_that_cannot_make_its_copy_fails_the_creation_and_all_copies_go() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[1].host.levers.lock().unwrap().create_error =
        Some(HostError::NoSpace("no room on /dev/x".into()));
    let (status, fault) = nodes[0].create("vm1", 1);
    assert_eq!(
        (status, fault["code"].as_str()),
        (409, Some("invalid_state"))
    );
    assert!(
        fault["message"]
            .as_str()
            .unwrap()
            .contains("n2: no room on /dev/x"),
        "{fault}"
    );
    eventually("no copy is left", || {
        (lab.copies("n1").is_empty() && lab.copies("n2").is_empty()).then_some(())
    });
    eventually("the tombstone is gone", || {
        nodes[0]
            .store
            .snapshot()
            .unwrap()
            .removed
            .is_empty()
            .then_some(())
    });
    // The name is free again.
    nodes[1].host.levers.lock().unwrap().create_error = None;
    assert_eq!(nodes[1].create("vm1", 1).0, 200);
}

#[test]
fn a_creation_whose_creator_died_is_cleaned_up_when_it_returns() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    // Nobody makes the second copy while n2 is down, so the creation hangs in its first step.
    let [n1, n2] = nodes;
    let (status, _) = n1.create("whole", 1);
    assert_eq!(status, 200);
    let (mut spec, _) = {
        let id = n1.volume_id("whole");
        n1.store.spec(id).unwrap().unwrap()
    };
    let (mut record, _) = n1.store.get_record(n1.volume_id("whole")).unwrap().unwrap();
    n1.stop();
    spec.name = "half".into();
    record.volume_id.0[0] ^= 1;
    record.state = State::Creating;
    for copy in &mut record.copies {
        copy.status = CopyStatus::Missing;
    }
    // Written as the dead instance of n1 would have left it.
    n2.store.create_volume(&spec, &record, None).unwrap();
    let n1 = lab.node("n1");
    eventually("the half-made volume is gone", || {
        let snapshot = n1.store.snapshot().unwrap();
        (!snapshot.names.contains_key("default/half") && snapshot.removed.is_empty()).then_some(())
    });
    assert_eq!(lab.copies("n1").len(), 1);
    assert_eq!(lab.copies("n2").len(), 1);
    assert_eq!(n1.volume("whole")["health"], "healthy");
}

#[test]
fn a_volume_is_attached_shown_and_detached() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[0].create("vm1", 1);
    let attached = attach(&nodes[1], "vm1");
    let socket = attached["socket"].as_str().unwrap();
    assert_eq!(
        socket,
        nodes[1]
            .run_dir
            .join("vhost/default/vm1.sock")
            .to_str()
            .unwrap()
    );
    assert!(fs::metadata(socket).is_ok());
    let view = nodes[0].volume("vm1");
    assert_eq!(view["attachment"]["node"], "n2");
    assert_eq!(view["attachment"]["phase"], "serving");
    assert_eq!(view["health"], "healthy", "{view}");
    assert_eq!(view["state"], "active");

    // Again is no error; elsewhere is, by name.
    assert_eq!(attach(&nodes[1], "vm1"), attached);
    let (status, fault) = nodes[0].post("/api/v1/volumes/default/vm1/attach", json!({}));
    assert_eq!(
        (status, fault["code"].as_str()),
        (409, Some("invalid_state"))
    );
    assert!(
        fault["message"].as_str().unwrap().contains("on n2"),
        "{fault}"
    );

    let (status, fault) = nodes[0].ask(Method::DELETE, "/api/v1/volumes/default/vm1", None);
    assert_eq!(status, 409, "{fault}");

    // Any node releases it.
    let (status, body) = nodes[0].post("/api/v1/volumes/default/vm1/detach", json!({}));
    assert_eq!(status, 200, "{body}");
    assert!(fs::metadata(socket).is_err());
    assert_eq!(nodes[0].volume("vm1")["state"], "clean");
    let (status, fault) = nodes[0].post("/api/v1/volumes/default/vm1/detach", json!({}));
    assert_eq!(
        (status, fault["code"].as_str()),
        (409, Some("invalid_state"))
    );
}

#[test]
fn a_connected_machine_keeps_its_disk_unless_forced() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[0].create("vm1", 1);
    attach(&nodes[0], "vm1");
    let id = nodes[0].volume_id("vm1");
    nodes[0].host.levers.lock().unwrap().connected.insert(id);
    let (status, fault) = nodes[1].post("/api/v1/volumes/default/vm1/detach", json!({}));
    assert_eq!(status, 409, "{fault}");
    assert!(
        fault["message"].as_str().unwrap().contains("connected"),
        "{fault}"
    );
    assert_eq!(nodes[1].volume("vm1")["attachment"]["phase"], "serving");
    let (status, body) =
        nodes[1].post("/api/v1/volumes/default/vm1/detach", json!({"force": true}));
    assert_eq!(status, 200, "{body}");
    assert!(nodes[1].volume("vm1")["attachment"].is_null());
}

#[test]
fn a_machine_that_connects_while_the_release_is_on_its_way_keeps_its_disk() {
    let lab = Lab::new();
    let nodes: [Node; 1] = lab.nodes();
    nodes[0].create("vm1", 0);
    attach(&nodes[0], "vm1");
    let id = nodes[0].volume_id("vm1");
    // The request is in the spec, as if it had been written just before the machine connected.
    nodes[0].host.levers.lock().unwrap().connected.insert(id);
    let (mut spec, at) = nodes[0].store.spec(id).unwrap().unwrap();
    spec.attachment.as_mut().unwrap().release =
        Some(lockstep::cluster::model::Release { force: false });
    nodes[0].store.cas_spec(id, at, &spec).unwrap();
    eventually("the node takes the request back", || {
        let (spec, now) = nodes[0].store.spec(id).unwrap().unwrap();
        let refused = now > at && spec.attachment.as_ref().unwrap().release.is_none();
        refused.then_some(())
    });
    assert_eq!(nodes[0].volume("vm1")["attachment"]["connected"], true);
}

#[test]
fn an_attach_that_fails_says_why_and_leaves_the_volume_detached() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[0].create("vm1", 0);
    nodes[1].host.levers.lock().unwrap().attach_error =
        Some(HostError::Refused("no copy can be read".into()));
    let (status, fault) =
        nodes[0].post("/api/v1/volumes/default/vm1/attach", json!({"node": "n2"}));
    assert_eq!(status, 409, "{fault}");
    assert!(
        fault["message"]
            .as_str()
            .unwrap()
            .contains("on n2: no copy can be read"),
        "{fault}"
    );
    assert!(nodes[0].volume("vm1")["attachment"].is_null());

    let (status, fault) =
        nodes[0].post("/api/v1/volumes/default/vm1/attach", json!({"node": "n9"}));
    assert_eq!((status, fault["code"].as_str()), (404, Some("not_found")));
    let long = format!("/tmp/{}", "x".repeat(120));
    let (status, fault) = nodes[0].post(
        "/api/v1/volumes/default/vm1/attach",
        json!({"socket": long}),
    );
    assert_eq!(
        (status, fault["code"].as_str()),
        (400, Some("invalid_input"))
    );
}

#[test]
fn a_busy_attach_is_tried_again_until_it_works() {
    let lab = Lab::new();
    let nodes: [Node; 1] = lab.nodes();
    nodes[0].create("vm1", 0);
    nodes[0].host.levers.lock().unwrap().attach_error =
        Some(HostError::Busy("the old attachment may still live".into()));
    thread::scope(|s| {
        let waiting = s.spawn(|| attach(&nodes[0], "vm1"));
        eventually("the reason shows", || {
            let view = nodes[0].volume("vm1");
            (view["health"] == "offline" && view["why"].as_str()?.contains("may still live"))
                .then_some(())
        });
        nodes[0].host.levers.lock().unwrap().attach_error = None;
        assert_eq!(waiting.join().unwrap()["phase"], "serving");
    });
}

#[test]
fn a_restarted_node_serves_again_what_its_spec_says() {
    let lab = Lab::new();
    let nodes: [Node; 2] = lab.nodes();
    nodes[0].create("vm1", 1);
    attach(&nodes[0], "vm1");
    let [n1, n2] = nodes;
    n1.crash();
    let view = n2.volume("vm1");
    assert_eq!(view["health"], "offline", "{view}");
    assert!(
        view["why"]
            .as_str()
            .unwrap()
            .contains("n1, which cannot be reached"),
        "{view}"
    );
    let (status, fault) = n2.post("/api/v1/volumes/default/vm1/detach", json!({}));
    assert_eq!((status, fault["code"].as_str()), (503, Some("try_again")));

    let n1 = lab.node("n1");
    eventually("n1 serves it again", || {
        let view = n2.volume("vm1");
        (view["attachment"]["phase"] == "serving").then_some(())
    });
    drop(n1);

    // A node that is gone for good gives its volumes up to force.
    let (status, body) = n2.post("/api/v1/volumes/default/vm1/detach", json!({"force": true}));
    assert_eq!(status, 200, "{body}");
    attach(&n2, "vm1");
    // When it returns after all, it does not serve what is no longer its.
    let n1 = lab.node("n1");
    assert!(n1.host.levers.lock().unwrap().changes.is_empty());
    assert_eq!(n1.volume("vm1")["attachment"]["node"], "n2");
}

#[test]
fn a_removed_volume_is_removed_on_every_node_also_on_one_that_was_away() {
    let lab = Lab::new();
    let nodes: [Node; 3] = lab.nodes();
    nodes[0].create("vm1", 2);
    nodes[0].create("vm2", 2);
    let keep = nodes[0].volume_id("vm2").to_string();
    let [n1, n2, n3] = nodes;
    n3.stop();
    let (status, body) = n1.ask(Method::DELETE, "/api/v1/volumes/default/vm1", None);
    assert_eq!(status, 200, "{body}");
    assert_eq!(
        n2.ask(Method::GET, "/api/v1/volumes/default/vm1", None).0,
        404
    );
    eventually("the copies of nodes that are there go", || {
        (lab.copies("n1").len() == 1 && lab.copies("n2").len() == 1).then_some(())
    });
    assert_eq!(lab.copies("n3").len(), 2);
    let _n3 = lab.node("n3");
    eventually("the copy of the node that was away goes", || {
        (lab.copies("n3") == [keep.clone()]).then_some(())
    });
    eventually("the tombstone goes", || {
        n1.store
            .snapshot()
            .unwrap()
            .removed
            .is_empty()
            .then_some(())
    });
}

#[test]
fn a_copy_that_the_registry_does_not_know_is_kept() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    let backup = lab.dir.path().join("backup.db");
    n1.create("vm2", 1);
    drop((n1, n2));
    // The registry is lost, and a new one begins: another cluster, without these volumes.
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::rename(
            lab.dir.path().join(format!("registry.db{suffix}")),
            lab.dir.path().join(format!("backup.db{suffix}")),
        );
    }
    assert!(backup.exists());
    let n1 = lab.node("n1");
    let (status, _) = n1.create("other", 0);
    assert_eq!(status, 200);
    assert_eq!(lab.copies("n1").len(), 3);
    let node = n1.get("/api/v1/nodes/n1");
    let unknown = node["copies"].as_array().unwrap().iter();
    assert_eq!(unknown.filter(|c| c["name"].is_null()).count(), 2);
}

#[test]
fn a_registry_that_becomes_another_clusters_is_not_believed() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    n1.create("vm1", 0);
    attach(&n1, "vm1");
    let id = n1.volume_id("vm1");
    // The same file, another cluster's content: as if the wrong backup had been restored.
    let raw = Sqlite::open(&lab.registry()).unwrap();
    let everything = raw.list("").unwrap();
    let changes: Vec<_> = everything
        .entries
        .iter()
        .filter(|(key, _)| key != "cluster")
        .map(|(key, _)| lockstep::registry::Change {
            key: key.clone(),
            value: None,
        })
        .chain([lockstep::registry::Change {
            key: "cluster".into(),
            value: Some(
                json!({"id": "00000000-0000-0000-0000-000000000001", "created": 1})
                    .to_string()
                    .into(),
            ),
        }])
        .collect();
    raw.txn(&[], &changes).unwrap();
    // Longer than the loop's tick would take is not needed: the watch tells at once, and nothing may happen.
    eventually("the change was seen", || {
        let log = n1.get("/api/v1/local/status");
        (log["attachments"].as_array()?.len() == 1).then_some(())
    });
    thread::sleep(std::time::Duration::from_millis(700));
    assert_eq!(lab.copies("n1"), [id.to_string()]);
    assert_eq!(n1.host_attachments(), 1);
    assert!(n1.fatal().is_none());
}

impl HostCount for Node {
    fn host_attachments(&self) -> usize {
        use lockstep::cluster::host::Host;
        self.host.attachments().len()
    }
}

trait HostCount {
    fn host_attachments(&self) -> usize;
}

#[test]
fn settings_change_live_and_the_attachment_is_told() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    attach(&n1, "vm1");
    let change =
        |body: serde_json::Value| n2.ask(Method::PATCH, "/api/v1/volumes/default/vm1", Some(body));
    let (status, body) = change(json!({
        "wishes": {"failure_mode": "hard", "suspend_deadline_ms": 5000},
        "label_add": {"env": "prod", "storageos.com/nocompress": "true"},
    }));
    assert_eq!(status, 200, "{body}");
    let told = eventually("the host is told", || {
        let levers = n1.host.levers.lock().unwrap();
        let (_, record) = levers.changes.last()?.clone();
        (record.failure_mode == FailureMode::Hard).then_some(record)
    });
    assert_eq!(told.suspend_deadline_ms, 5000);
    assert!(!told.compress);
    let view = n1.volume("vm1");
    assert_eq!(
        view["labels"],
        json!({"env": "prod", "lockstep.io/nocompress": "true"})
    );

    for (body, status, code) in [
        (json!({}), 400, "invalid_input"),
        // There is no third node for it.
        (json!({"wishes": {"replicas": 2}}), 409, "invalid_state"),
        (json!({"size": 1 << 20}), 400, "invalid_input"),
        (
            json!({"wishes": {"failure_mode": "softish"}}),
            400,
            "invalid_input",
        ),
        (
            json!({"label_add": {"lockstep.io/replica": "1"}}),
            400,
            "invalid_input",
        ),
        (json!({"colour": 1}), 400, "invalid_input"),
    ] {
        let (got, fault) = change(body.clone());
        assert_eq!(
            (got, fault["code"].as_str()),
            (status, Some(code)),
            "{body}: {fault}"
        );
    }
    // The size is what the copies have room for: this one is a wish, until the attachment has made it true.
    let (status, body) = change(json!({"size": 2_u64 << 30}));
    assert_eq!(status, 200, "{body}");
    let view = n1.volume("vm1");
    assert_eq!(
        (&view["size"], &view["growing_to"]),
        (&json!(1 << 30), &json!(2_u64 << 30))
    );
    let told = eventually("the host is told of the wish", || {
        let levers = n1.host.levers.lock().unwrap();
        let (_, record) = levers.changes.last()?.clone();
        record.grow.clone()
    });
    assert_eq!((told.to, told.refused), (2 << 30, None));
    // Its own size takes the wish back.
    let (status, body) = change(json!({"size": 1_u64 << 30}));
    assert_eq!(status, 200, "{body}");
    assert_eq!(n1.volume("vm1").get("growing_to"), None);
}

#[test]
fn a_mode_that_would_suspend_the_volume_is_refused() {
    let lab = Lab::new();
    let [n1, _n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    let id = n1.volume_id("vm1");
    let (mut record, at) = n1.store.get_record(id).unwrap().unwrap();
    record.copies[1].status = CopyStatus::Missing;
    n1.store.cas_record(id, at, &record).unwrap();
    let hard = json!({"wishes": {"failure_mode": "hard"}});
    let (status, fault) = n1.ask(Method::PATCH, "/api/v1/volumes/default/vm1", Some(hard));
    assert_eq!(
        (status, fault["code"].as_str()),
        (409, Some("invalid_state"))
    );
    assert_eq!(n1.volume("vm1")["health"], "degraded");
}

#[test]
fn a_second_node_of_the_same_name_is_refused_while_the_first_lives() {
    let lab = Lab::new();
    let n1 = lab.node("n1");
    let mut config = lab.config("n1");
    config.data_dir = lab.dir.path().join("elsewhere");
    config.run_dir = lab.dir.path().join("elsewhere.run");
    let fault = lab.start(config.clone()).err().unwrap();
    assert_eq!(fault.code, Code::Exists);
    assert!(fault.message.contains("n1 runs already"), "{fault}");
    assert!(n1.fatal().is_none());
    drop(n1);
    let _n1 = lab.start(config).unwrap();
}

#[test]
fn ports_and_directories_in_use_are_named_by_their_flag() {
    let lab = Lab::new();
    let n1 = lab.node("n1");
    let mut config = lab.config("n2");
    config.http = n1.http.parse().unwrap();
    let fault = lab.start(config).err().unwrap();
    assert!(fault.message.contains("--http"), "{fault}");
    let mut config = lab.config("n2");
    config.listen = n1.http.parse().unwrap();
    let fault = lab.start(config).err().unwrap();
    assert!(fault.message.contains("--listen"), "{fault}");
    let mut config = lab.config("n2");
    config.run_dir = n1.run_dir.clone();
    let fault = lab.start(config).err().unwrap();
    assert!(fault.hint.unwrap().contains("--run-dir"));
    let mut config = lab.config("n2");
    config.listen = "0.0.0.0:0".parse().unwrap();
    assert_eq!(lab.start(config).err().unwrap().code, Code::InvalidInput);
}

#[test]
fn a_process_whose_name_was_taken_says_that_it_must_end() {
    let lab = Lab::new();
    let n1 = lab.node("n1");
    n1.create("vm1", 0);
    attach(&n1, "vm1");
    let name = lockstep::replication::ids::NodeName("n1".into());
    let (mut record, _) = n1.store.node(&name).unwrap().unwrap();
    record.instance.0[0] ^= 1;
    n1.store
        .retry(|| {
            let (_, at) = n1.store.node(&name)?.unwrap();
            n1.store.cas_node(Some(at), &record)
        })
        .unwrap();
    eventually("it notices", || n1.fatal());
    let (status, body) = n1.ask(Method::GET, "/healthz", None);
    assert_eq!((status, body["status"].as_str()), (503, Some("failed")));
    assert_eq!(n1.host_attachments(), 1);
}

#[test]
fn declared_volumes_are_created_once_their_nodes_are_there_and_served() {
    let lab = Lab::new();
    let n1 = lab.node_serving(
        "n1",
        &["vm1,size=1GiB,replicas=1,failure-mode=hard,num-queues=2"],
    );
    let n2 = lab.node("n2");
    eventually("it is served", || {
        let volumes = n2.get("/api/v1/volumes");
        (volumes[0]["attachment"]["phase"] == "serving").then_some(())
    });
    let view = n2.volume("vm1");
    assert_eq!(view["failure_mode"], "hard");
    assert_eq!(view["attachment"]["num_queues"], 2);
    drop(n1);
    // Another size or number of queues does not change it, and does not keep it from being served.
    let _n1 = lab.node_serving("n1", &["vm1,size=2GiB,replicas=1,num-queues=4"]);
    eventually("it is served again", || {
        (n2.volume("vm1")["attachment"]["phase"] == "serving").then_some(())
    });
    assert_eq!(n2.volume("vm1")["size"], 1 << 30);
}

#[test]
fn nodes_know_each_other_and_who_is_gone() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    eventually("n1 knows n2", || {
        (n1.host.levers.lock().unwrap().peers.len() == 2).then_some(())
    });
    n2.create("vm1", 1);
    eventually("n2 has noted how large its disk is", || {
        let name = lockstep::replication::ids::NodeName("n2".into());
        let (record, _) = n1.store.node(&name).unwrap()?;
        (record.capacity.total > 0).then_some(())
    });
    n2.stop();
    let nodes = n1.get("/api/v1/nodes");
    assert_eq!(
        nodes[1]["capacity"]["total"],
        100_u64 << 30,
        "as last known"
    );
    assert_eq!(nodes[0]["health"], "online");
    assert_eq!(nodes[1]["health"], "offline");
    assert_eq!(nodes[0]["masters"], 1);
    assert_eq!(nodes[1]["replicas"], 1);
    assert!(!nodes[1]["why"].as_str().unwrap().is_empty());
    let cluster = n1.get("/api/v1/cluster");
    assert_eq!(cluster["nodes_online"], 1);
    assert_eq!(cluster["health"], json!({"degraded": 1}));
    assert_eq!(cluster["problems"].as_array().unwrap().len(), 2);
}

#[test]
fn a_node_that_comes_back_at_another_address_is_found_there() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    let address = || n1.get("/api/v1/nodes/n2")["address"].clone();
    let reached = || {
        let node = n1.get("/api/v1/nodes/n1");
        (node["ways"][0]["reached"] == true).then_some(())
    };
    eventually("n1 reaches n2", reached);
    let before = address();
    n2.stop();
    eventually("n1 notices that it reaches n2 no more", || {
        reached().is_none().then_some(())
    });
    let mut config = lab.config("n2");
    config.listen = "127.0.0.2:0".parse().unwrap();
    let _n2 = lab.start(config).unwrap();
    assert_ne!(address(), before);
    eventually("n1 reaches it there", reached);
    let peers = n1.host.levers.lock().unwrap().peers.clone();
    let engine = peers.iter().find(|(name, _)| name.0 == "n2").unwrap();
    assert_eq!(Some(engine.1.to_string().as_str()), address().as_str());
}

#[test]
fn racing_creations_of_one_name_make_one_volume() {
    let lab = Lab::new();
    let nodes: [Node; 3] = lab.nodes();
    let made = thread::scope(|s| {
        let racers: Vec<_> = nodes
            .iter()
            .map(|n| s.spawn(|| n.create("vm1", 1).0))
            .collect();
        let statuses: Vec<u16> = racers.into_iter().map(|r| r.join().unwrap()).collect();
        assert!(
            statuses.iter().all(|s| [200, 409].contains(s)),
            "{statuses:?}"
        );
        statuses.iter().filter(|s| **s == 200).count()
    });
    assert_eq!(made, 1);
    eventually("two copies in all", || {
        let copies: usize = nodes.iter().map(|n| lab.copies(&n.name).len()).sum();
        (copies == 2).then_some(())
    });
}

#[test]
fn a_fenced_attachment_that_is_still_wanted_is_made_anew() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    n1.create("vm1", 0);
    attach(&n1, "vm1");
    let before = n1.volume("vm1")["epoch"].as_u64().unwrap();
    n1.host.levers.lock().unwrap().phase = Some(Phase::Fenced);
    eventually("it lets go", || {
        let view = n1.volume("vm1");
        (view["epoch"].as_u64()? > before).then_some(())
    });
    n1.host.levers.lock().unwrap().phase = None;
    eventually("it serves", || {
        (n1.volume("vm1")["health"] == "healthy").then_some(())
    });
}

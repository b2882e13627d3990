//! The files of copies follow the record: made, made anew after a wipe, deleted when they were removed, otherwise kept.

mod mgmt_support;

use std::fs;

use lockstep::cluster::host::HostError;
use lockstep::replication::ids::{CopyId, Epoch, NodeName};
use lockstep::replication::record::{CopyEntry, CopyStatus};
use mgmt_support::{Lab, Node, eventually};
use serde_json::json;

fn blank(number: u8, node: &str) -> CopyEntry {
    CopyEntry::blank(CopyId([number; 16]), NodeName(node.into()))
}

#[test]
fn a_blank_entry_gets_files_under_an_identity_that_its_own_node_drew() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 1);
    let id = n1.volume_id("vm1");
    let free = ["n1", "n2", "n3"]
        .into_iter()
        .find(|n| lab.copy_on(n, id).is_none())
        .unwrap();
    n1.edit("vm1", |r| {
        assert_eq!(r.add_copy(blank(7, free)), Some(2));
    });
    let made = eventually("the copy is made", || lab.copy_on(free, id));
    let entry = n1.record("vm1").copies[2].clone();
    assert_eq!(entry, CopyEntry::blank(made, NodeName(free.into())));
    // Whoever added the entry cannot know what was on that disk before.
    assert_ne!(made, CopyId([7; 16]));
}

#[test]
fn a_copy_that_cannot_be_made_is_tried_again_and_said_why() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 0);
    let id = n1.volume_id("vm1");
    let (free, node) = match lab.copy_on("n1", id) {
        Some(_) => ("n2", &n2),
        None => ("n1", &n1),
    };
    node.host.levers.lock().unwrap().create_error =
        Some(HostError::NoSpace("no room on /dev/x".into()));
    n1.edit("vm1", |r| r.copies.push(blank(7, free)));
    eventually("it says why", || {
        let said = |e: &String| e.contains("no room on /dev/x");
        n1.events("vm1").iter().any(said).then_some(())
    });
    node.host.levers.lock().unwrap().create_error = None;
    eventually("the copy is made", || lab.copy_on(free, id));
}

#[test]
fn a_wiped_disk_gets_a_new_copy_in_the_same_place() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    let id = n1.volume_id("vm1");
    let lost = n1
        .record("vm1")
        .copy_on(&NodeName("n2".into()))
        .unwrap()
        .clone();
    n2.stop();
    fs::remove_dir_all(lab.dir.path().join("n2").join("copies")).unwrap();
    let n2 = lab.node("n2");
    // While the record has it in sync, only an attachment may put it out (this host's do not); until then it is said.
    let view = eventually("it is seen", || {
        let view = n1.volume("vm1");
        view["why"]
            .as_str()?
            .contains("not on its disk")
            .then_some(view)
    });
    assert_eq!(view["health"], "degraded", "{view}");
    assert!(
        view["why"].as_str().unwrap().contains("made anew"),
        "{view}"
    );
    assert_eq!(n1.record("vm1").copy(lost.copy_id), Some(&lost));
    n1.edit("vm1", |r| {
        let at = r.copies.iter().position(|c| c.node.0 == "n2").unwrap();
        r.copies[at].status = CopyStatus::Missing;
        r.copies[at].base.last = Some(Epoch(1));
    });
    let made = eventually("a new copy is made", || lab.copy_on("n2", id));
    assert_ne!(made, lost.copy_id);
    let record = n1.record("vm1");
    assert_eq!(record.copies.len(), 2);
    assert_eq!(
        record.copy_on(&NodeName("n2".into())),
        Some(&blank_of(made, "n2"))
    );
    let events = n1.events("vm1");
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("S18") && e.contains(&lost.copy_id.to_string())),
        "{events:?}"
    );
    drop(n2);
}

fn blank_of(copy: CopyId, node: &str) -> CopyEntry {
    CopyEntry::blank(copy, NodeName(node.into()))
}

#[test]
fn a_removed_copy_is_deleted_on_its_node_also_when_that_was_away() {
    let lab = Lab::new();
    let [n1, n2, n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 2);
    let id = n1.volume_id("vm1");
    n3.stop();
    n1.edit("vm1", |r| {
        for copy in r.copies.iter_mut().filter(|c| c.node.0 != "n1") {
            copy.status = CopyStatus::Removed;
        }
        r.replicas_wanted = 0;
        r.master = r.copies.iter().find(|c| c.node.0 == "n1").unwrap().copy_id;
    });
    eventually("n2's is gone", || {
        lab.copy_on("n2", id).is_none().then_some(())
    });
    assert!(lab.copy_on("n3", id).is_some());
    let n3 = lab.node("n3");
    eventually("n3's is gone", || {
        lab.copy_on("n3", id).is_none().then_some(())
    });
    assert!(lab.copy_on("n1", id).is_some());
    // What was removed is shown nowhere.
    let view = n1.volume("vm1");
    assert_eq!(view["copies"].as_array().unwrap().len(), 1, "{view}");
    assert_eq!(
        (&view["health"], &view["why"]),
        (&json!("healthy"), &json!(""))
    );
    assert_eq!(n1.get("/api/v1/nodes/n3")["replicas"], 0);
    // And its node can have a new one, which the removal of the volume finds beside the old name.
    n1.edit("vm1", |r| r.copies.push(blank(9, "n3")));
    eventually("a new one is made", || lab.copy_on("n3", id));
    let (status, body) = n1.ask(hyper::Method::DELETE, "/api/v1/volumes/default/vm1", None);
    assert_eq!(status, 200, "{body}");
    eventually("it goes with the volume", || {
        lab.copy_on("n3", id).is_none().then_some(())
    });
    drop((n2, n3));
}

#[test]
fn a_copy_that_the_record_does_not_know_is_set_aside_only_when_a_new_one_needs_its_place() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    let id = n1.volume_id("vm1");
    let old = lab.copy_on("n2", id).unwrap();
    // Its place was taken by another node's copy while n2 was away: no tombstone tells of it.
    n1.edit("vm1", |r| {
        let at = r.copies.iter().position(|c| c.node.0 == "n2").unwrap();
        r.master = r.copies[1 - at].copy_id;
        r.copies[at] = blank(7, "elsewhere");
    });
    n2.stop();
    let n2 = lab.node("n2");
    assert_eq!(lab.copy_on("n2", id), Some(old));
    n1.edit("vm1", |r| r.copies.push(blank(8, "n2")));
    let made = eventually("a new one is made", || {
        lab.copy_on("n2", id).filter(|c| *c != old)
    });
    assert_ne!(made, CopyId([8; 16]));
    let aside = lab.dir.path().join("n2").join(format!("aside-{id}"));
    assert_eq!(fs::read_to_string(aside).unwrap(), old.to_string());
    drop(n2);
}

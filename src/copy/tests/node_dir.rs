use std::fs;

use super::state;
use crate::copy::{NodeDir, NodeDirError, Store};
use crate::replication::ids::{ClusterId, NodeName, VolumeId};

fn node(name: &str) -> NodeName {
    NodeName(name.into())
}

#[test]
fn a_data_directory_remembers_its_node_and_cluster() {
    let tmp = tempfile::tempdir().unwrap();
    let (one, two) = (ClusterId([1; 16]), ClusterId([2; 16]));
    let mut dir = NodeDir::open(tmp.path(), &node("n1"), None).unwrap();
    assert_eq!(dir.cluster(), None);
    assert!(matches!(
        NodeDir::open(tmp.path(), &node("n1"), None),
        Err(NodeDirError::InUse { .. })
    ));
    dir.join(one).unwrap();
    dir.join(one).unwrap();
    assert!(matches!(
        dir.join(two),
        Err(NodeDirError::OtherCluster { .. })
    ));
    let created = dir.created();
    drop(dir);
    let again = NodeDir::open(tmp.path(), &node("n1"), None).unwrap();
    assert_eq!((again.cluster(), again.created()), (Some(one), created));
    drop(again);
    let e = NodeDir::open(tmp.path(), &node("n2"), None).unwrap_err();
    assert!(
        e.to_string().contains("belongs to node 'n1', not 'n2'"),
        "{e}"
    );
    assert!(matches!(
        NodeDir::open(tmp.path(), &node("n1"), Some(two)),
        Err(NodeDirError::OtherCluster { .. })
    ));
}

#[test]
fn an_identity_that_is_newer_damaged_or_gone_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("node.json");
    let open = || NodeDir::open(tmp.path(), &node("n1"), None);
    let volume = open().unwrap().volume_dir(VolumeId([3; 16]));
    fs::write(&file, r#"{"format": 2, "shape": "unknown"}"#).unwrap();
    assert!(matches!(open(), Err(NodeDirError::Newer { found: 2, .. })));
    fs::write(&file, "{").unwrap();
    assert!(matches!(open(), Err(NodeDirError::Damaged { .. })));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&volume).unwrap();
    assert!(matches!(open(), Err(NodeDirError::NoIdentity { .. })));
    fs::remove_dir(&volume).unwrap();
    open().unwrap();
}

#[test]
fn the_volumes_are_listed_and_what_a_crash_left_is_swept() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = NodeDir::open(tmp.path(), &node("n1"), None).unwrap();
    let (a, b) = (VolumeId([0xaa; 16]), VolumeId([0xbb; 16]));
    for id in [b, a] {
        Store::create(&dir.volume_dir(id), &state(), false).unwrap();
    }
    let volumes = tmp.path().join("volumes");
    for left in [".new-x", ".gone-y", "lost+found"] {
        fs::create_dir(volumes.join(left)).unwrap();
    }
    assert_eq!(dir.volumes().unwrap(), [a, b]);
    drop(dir);
    let dir = NodeDir::open(tmp.path(), &node("n1"), None).unwrap();
    assert_eq!(dir.volumes().unwrap(), [a, b]);
    assert_eq!(fs::read_dir(&volumes).unwrap().count(), 3);
}

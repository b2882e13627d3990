//! Rules: policies of a namespace that give labels to its volumes.
//!
//! They are applied when a volume is created, and again when somebody asks for it; a preview says what would change.
//! A rule never overrides what a person said: flags win over labels, labels over rules. Rules are applied from the
//! lowest weight up, equal ones by name, each on the labels as the earlier ones left them; so of two that set one label
//! the heavier wins, and one rule may select what another one marked.

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::{Code, Fault};
use super::labels::{self, Of};
use super::model::{Action, FromRule, Labels, NamespaceRecord, RuleLabels, RuleRecord, VolumeName};
use super::namespaces;
use super::plane::{Plane, whole_volumes};
use super::replicas::Around;
use super::selector::Selector;
use super::settings::Wishes;
use super::snapshot::Snapshot;
use super::store::{Race, Versioned};
use super::units::{show_time, wall_ms};
use super::update::{UpdateRequest, update_around};
use crate::registry::Revision;
use crate::replication::failure_mode::FailureMode;

/// The weight of a rule that names none.
pub const WEIGHT: i32 = 5;

/// The labels that the rules give a volume whose own labels are `own`.
pub fn evaluate(rules: &[RuleRecord], own: &Labels) -> Result<RuleLabels, Fault> {
    let mut given = RuleLabels::new();
    let mut all = own.clone();
    let mut rules: Vec<&RuleRecord> = rules.iter().filter(|r| r.active).collect();
    rules.sort_by(|a, b| (a.weight, &a.name).cmp(&(b.weight, &b.name)));
    for rule in rules {
        // One that a newer version wrote: going on without it would make volumes with fewer replicas than somebody
        // decided on.
        let selector = Selector::parse(&rule.selector, Of::Volume).map_err(|e| {
            Fault::state(format!("rule {} cannot be applied: {e}", rule.full_name()))
                .hint("change it with lockstep rule update, or take it out with --inactive")
        })?;
        if !selector.matches(&all) {
            continue;
        }
        for (key, value) in &rule.labels {
            if own.contains_key(key) {
                continue;
            }
            match rule.action {
                Action::Add => {
                    all.insert(key.clone(), value.clone());
                    let from = FromRule {
                        value: value.clone(),
                        rule: rule.name.clone(),
                    };
                    given.insert(key.clone(), from);
                }
                Action::Remove => {
                    let named = |present: &String| value.is_empty() || present == value;
                    if all.get(key).is_some_and(named) {
                        all.remove(key);
                        given.remove(key);
                    }
                }
            }
        }
    }
    Ok(given)
}

/// The rules of a namespace.
pub fn of_namespace(snapshot: &Snapshot, namespace: &str) -> Vec<RuleRecord> {
    let rules = snapshot.rules.values().map(|(rule, _)| rule);
    rules
        .filter(|r| r.namespace == namespace)
        .cloned()
        .collect()
}

/// A rule as people see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// Which volumes.
    pub selector: String,
    /// `add` or `remove`.
    pub action: Action,
    /// Which labels.
    pub labels: Labels,
    /// Its turn, the lowest first.
    pub weight: i32,
    /// Whether it is applied.
    pub active: bool,
    /// When it was created, UTC.
    pub created: String,
    /// `namespace/name` of the volumes that have a label of it; only in an inspection.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
}

/// A rule as people see it.
pub fn view(rule: &RuleRecord) -> RuleView {
    RuleView {
        namespace: rule.namespace.clone(),
        name: rule.name.clone(),
        selector: rule.selector.clone(),
        action: rule.action,
        labels: rule.labels.clone(),
        weight: rule.weight,
        active: rule.active,
        created: show_time(rule.created),
        volumes: Vec::new(),
    }
}

/// All rules, or those of one namespace, in the order in which they are applied.
pub fn list(snapshot: &Snapshot, namespace: Option<&str>) -> Vec<RuleView> {
    let rules = snapshot.rules.values().map(|(rule, _)| rule);
    let mut rules: Vec<&RuleRecord> = rules
        .filter(|r| namespace.is_none_or(|n| r.namespace == n))
        .collect();
    rules.sort_by(|a, b| (&a.namespace, a.weight, &a.name).cmp(&(&b.namespace, b.weight, &b.name)));
    rules.into_iter().map(view).collect()
}

/// One rule with its volumes.
pub fn inspect(snapshot: &Snapshot, name: &VolumeName) -> Result<RuleView, Fault> {
    let (rule, _) = snapshot
        .rules
        .get(&name.to_string())
        .ok_or_else(|| missing(name))?;
    let mut view = view(rule);
    view.volumes = whole_volumes(snapshot)
        .map(|(_, (spec, _), _)| spec)
        .filter(|s| s.namespace == rule.namespace)
        .filter(|s| s.from_rules.values().any(|l| l.rule == rule.name))
        .map(|s| s.full_name().to_string())
        .collect();
    view.volumes.sort();
    Ok(view)
}

fn missing(name: &VolumeName) -> Fault {
    Fault::not_found(format!("there is no rule {name}")).hint("see: lockstep rule ls -A")
}

/// Whether, and how, a change of a rule reaches volumes that exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reach {
    /// Apply the namespace's rules to all its volumes again.
    pub reapply: bool,
    /// Only say what that would change; the rule is not written either.
    pub preview: bool,
}

/// A request for a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRequest {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// Which volumes.
    pub selector: String,
    /// Add or remove.
    #[serde(default)]
    pub action: Action,
    /// Which labels.
    pub labels: Labels,
    /// Its turn.
    #[serde(default)]
    pub weight: Option<i32>,
    /// Not applied for now.
    #[serde(default)]
    pub inactive: bool,
    /// Which volumes that exist it reaches.
    #[serde(default)]
    pub reach: Reach,
}

/// A request to change a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuleUpdate {
    /// Which volumes.
    pub selector: Option<String>,
    /// Add or remove.
    pub action: Option<Action>,
    /// Labels to put in.
    pub label_add: Labels,
    /// Labels to take out.
    pub label_rm: Vec<String>,
    /// Its turn.
    pub weight: Option<i32>,
    /// Whether it is applied.
    pub active: Option<bool>,
    /// Which volumes that exist it reaches.
    pub reach: Reach,
}

/// What came of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleDone {
    /// `namespace/name`.
    pub rule: String,
    /// Nothing was written.
    pub preview: bool,
    /// The volumes that changed, would change, or could not be changed.
    pub volumes: Vec<Reapplied>,
}

/// What applying the rules again did to one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reapplied {
    /// `namespace/name`.
    pub volume: String,
    /// What changed, one clause each.
    pub changes: Vec<String>,
    /// Why it could not.
    pub fault: Option<Fault>,
}

/// Makes a rule.
pub fn create(plane: &Plane, request: &RuleRequest) -> Result<RuleDone, Fault> {
    let name = VolumeName::new(&request.namespace, &request.name)?;
    let rule = checked(RuleRecord {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        created: wall_ms(),
        selector: request.selector.clone(),
        action: request.action,
        labels: request.labels.clone(),
        weight: request.weight.unwrap_or(WEIGHT),
        active: !request.inactive,
    })?;
    change(plane, &name, request.reach, "created", |present| {
        match present {
            None => Ok(rule.clone()),
            // An ambiguous write of our own that went through.
            Some(present) if *present == rule => Ok(rule.clone()),
            Some(_) => Err(
                Fault::new(Code::Exists, format!("rule {name} exists already"))
                    .hint("choose another name, or: lockstep rule update"),
            ),
        }
    })
}

/// Changes a rule.
pub fn update(plane: &Plane, name: &VolumeName, request: &RuleUpdate) -> Result<RuleDone, Fault> {
    let asked = RuleUpdate {
        reach: Reach::default(),
        ..request.clone()
    };
    if asked == RuleUpdate::default() && request.reach == Reach::default() {
        return Err(Fault::input(format!("nothing to change on rule {name}"))
            .hint("see: lockstep rule update --help"));
    }
    let removed = request
        .label_rm
        .iter()
        .map(|key| labels::own_key(key, Of::Volume))
        .collect::<Result<Vec<_>, _>>()?;
    let added = labels::check(request.label_add.clone(), Of::Volume)?;
    change(plane, name, request.reach, "updated", |present| {
        let mut rule = present.cloned().ok_or_else(|| missing(name))?;
        if let Some(selector) = &request.selector {
            rule.selector.clone_from(selector);
        }
        rule.labels.retain(|k, _| !removed.contains(k));
        rule.labels.extend(added.clone());
        rule.action = request.action.unwrap_or(rule.action);
        rule.weight = request.weight.unwrap_or(rule.weight);
        rule.active = request.active.unwrap_or(rule.active);
        checked(rule)
    })
}

/// Removes a rule. Volumes keep what it gave them unless `reach` says otherwise.
pub fn remove(plane: &Plane, name: &VolumeName, reach: Reach) -> Result<RuleDone, Fault> {
    let mut volumes = Vec::new();
    if reach.preview {
        let around = Around::look(plane)?;
        let mut rules = of_namespace(&around.snapshot, &name.namespace);
        if !rules.iter().any(|r| r.name == name.name) {
            return Err(missing(name));
        }
        rules.retain(|r| r.name != name.name);
        volumes = apply(plane, &name.namespace, &around, &rules, true);
        return Ok(done(name, reach, volumes));
    }
    let mut seen = false;
    plane
        .store
        .retry(|| {
            let Some((_, revision)) = plane.store.rule(name)? else {
                return match seen {
                    true => Ok(()), // our own unknown outcome, or another one's
                    false => Err(Race::Fault(missing(name))),
                };
            };
            seen = true;
            Ok(plane.store.remove_rule(name, revision).map(drop)?)
        })
        .map_err(|race: Race| Fault::from(race))?;
    note(plane, name, "removed");
    if reach.reapply {
        volumes = apply_present(plane, &name.namespace)?;
    }
    Ok(done(name, reach, volumes))
}

fn change(
    plane: &Plane,
    name: &VolumeName,
    reach: Reach,
    word: &str,
    next: impl Fn(Option<&RuleRecord>) -> Result<RuleRecord, Fault>,
) -> Result<RuleDone, Fault> {
    if reach.preview {
        let around = Around::look(plane)?;
        let present = around.snapshot.rules.get(&name.to_string());
        let rule = next(present.map(|(rule, _)| rule))?;
        let mut rules = of_namespace(&around.snapshot, &name.namespace);
        rules.retain(|r| r.name != name.name);
        rules.push(rule);
        let volumes = apply(plane, &name.namespace, &around, &rules, true);
        return Ok(done(name, reach, volumes));
    }
    let changed = plane
        .store
        .retry(|| {
            let snapshot = plane.store.snapshot()?;
            let present: Option<&Versioned<RuleRecord>> = snapshot.rules.get(&name.to_string());
            let rule = next(present.map(|(rule, _)| rule))?;
            if present.is_some_and(|(present, _)| *present == rule) {
                return Ok(false);
            }
            let namespace: Option<NamespaceRecord> = namespaces::record(&snapshot, &name.namespace);
            let at: Option<Revision> = present.map(|(_, revision)| *revision);
            plane.store.cas_rule(at, &rule, namespace.as_ref())?;
            Ok(true)
        })
        .map_err(|race: Race| Fault::from(race))?;
    if changed {
        note(plane, name, word);
    }
    let volumes = match reach.reapply {
        true => apply_present(plane, &name.namespace)?,
        false => Vec::new(),
    };
    Ok(done(name, reach, volumes))
}

fn note(plane: &Plane, name: &VolumeName, word: &str) {
    plane
        .events
        .push(What::node("", word, "rule").text(format!("rule {name}")));
}

fn done(name: &VolumeName, reach: Reach, volumes: Vec<Reapplied>) -> RuleDone {
    RuleDone {
        rule: name.to_string(),
        preview: reach.preview,
        volumes,
    }
}

fn apply_present(plane: &Plane, namespace: &str) -> Result<Vec<Reapplied>, Fault> {
    let around = Around::look(plane)?;
    let rules = of_namespace(&around.snapshot, namespace);
    Ok(apply(plane, namespace, &around, &rules, false))
}

/// Applies the rules to all volumes of the namespace; those that stay as they are are not listed.
fn apply(
    plane: &Plane,
    namespace: &str,
    around: &Around,
    rules: &[RuleRecord],
    preview: bool,
) -> Vec<Reapplied> {
    let request = UpdateRequest {
        reapply: true,
        preview,
        ..UpdateRequest::default()
    };
    let mut names: Vec<VolumeName> = whole_volumes(&around.snapshot)
        .map(|(_, (spec, _), _)| spec.full_name())
        .filter(|name| name.namespace == namespace)
        .collect();
    names.sort();
    let mut volumes = Vec::new();
    for name in names {
        let (changes, fault) = match update_around(plane, &name, &request, around, Some(rules)) {
            Ok(changes) => (changes, None),
            // Removed meanwhile.
            Err(fault) if fault.code == Code::NotFound => continue,
            Err(fault) => (Vec::new(), Some(fault)),
        };
        if !changes.is_empty() || fault.is_some() {
            volumes.push(Reapplied {
                volume: name.to_string(),
                changes,
                fault,
            });
        }
    }
    volumes
}

/// The rule as it is stored, if it makes sense.
fn checked(mut rule: RuleRecord) -> Result<RuleRecord, Fault> {
    let name = rule.full_name();
    rule.selector = Selector::parse(&rule.selector, Of::Volume)?.to_string();
    rule.labels = labels::check(rule.labels, Of::Volume)?;
    if rule.labels.is_empty() {
        return Err(Fault::input(format!(
            "rule {name} has no label to {}",
            rule.action.word()
        ))
        .hint("give it one: --label lockstep.io/replicas=2"));
    }
    if rule.action == Action::Add {
        // What no volume could be created with is refused here, where somebody can still mend it.
        let wishes = Wishes::of_labels(&rule.labels)?;
        wishes.replicas()?;
        wishes.failure_mode(FailureMode::Soft(None))?;
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `name weight selector action labels`, the labels joined by ','; a '-' before it: inactive.
    fn rule(text: &str) -> RuleRecord {
        let words: Vec<&str> = text.split(' ').collect();
        let [name, weight, selector, action, labels] = words[..] else {
            panic!("five words: {text}");
        };
        let pair = |pair: &str| {
            let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
            (k.to_string(), v.to_string())
        };
        RuleRecord {
            namespace: "default".into(),
            name: name.trim_start_matches('-').into(),
            created: 0,
            selector: selector.trim_matches('*').into(),
            action: match action {
                "add" => Action::Add,
                _ => Action::Remove,
            },
            labels: labels.split(',').map(pair).collect(),
            weight: weight.parse().unwrap(),
            active: !name.starts_with('-'),
        }
    }

    fn labels(text: &str) -> Labels {
        let pairs = text.split_whitespace().filter_map(|p| p.split_once('='));
        pairs.map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn rules_give_what_the_table_says() {
        for (rules, own, expected) in [
            (&["ha 5 env==prod add r=2"][..], "env=prod", "r=2/ha"),
            (&["ha 5 env==prod add r=2"], "env=dev", ""),
            (&["-ha 5 env==prod add r=2"], "env=prod", ""),
            (&["all 5 * add r=1,z=0"], "", "r=1/all z=0/all"),
            // The heavier wins, whatever their names and order.
            (&["a 9 * add r=9", "b 1 * add r=1"], "", "r=9/a"),
            (&["b 1 * add r=1", "a 9 * add r=9"], "", "r=9/a"),
            // Equal weights go by name.
            (&["b 5 * add r=2", "a 5 * add r=1"], "", "r=2/b"),
            // People's labels win over any rule.
            (&["ha 5 * add r=2,s=1"], "r=1", "s=1/ha"),
            (&["no 5 * remove env"], "env=prod", ""),
            // One rule marks, a heavier one selects.
            (
                &["mark 1 size>9 add big=yes", "ha 2 big add r=2"],
                "size=10",
                "big=yes/mark r=2/ha",
            ),
            (
                &["mark 2 size>9 add big=yes", "ha 1 big add r=2"],
                "size=10",
                "big=yes/mark",
            ),
            // Removed: any value, or that one; only what lighter rules set.
            (&["ha 1 * add r=2", "no 2 env==dev remove r"], "env=dev", ""),
            (
                &["ha 1 * add r=2", "no 2 env==dev remove r=3"],
                "env=dev",
                "r=2/ha",
            ),
            (&["ha 1 * add r=2", "no 2 * remove r=2"], "", ""),
            (&["ha 2 * add r=2", "no 1 * remove r"], "", "r=2/ha"),
        ] {
            let rules: Vec<RuleRecord> = rules.iter().map(|r| rule(r)).collect();
            let given = evaluate(&rules, &labels(own)).unwrap();
            let text: Vec<String> = given
                .iter()
                .map(|(k, l)| format!("{k}={}/{}", l.value, l.rule))
                .collect();
            assert_eq!(text.join(" "), expected, "{rules:?} on {own}");
        }
    }

    #[test]
    fn a_rule_that_cannot_be_read_is_not_passed_over() {
        let mut odd = rule("odd 5 * add r=2");
        odd.selector = "env ~= prod".into();
        let fault = evaluate(std::slice::from_ref(&odd), &Labels::new()).unwrap_err();
        assert!(fault.message.contains("rule default/odd"), "{fault}");
        odd.active = false;
        assert!(evaluate(&[odd], &Labels::new()).unwrap().is_empty());
    }

    #[test]
    fn a_rule_that_no_volume_could_follow_is_refused() {
        for (text, part) in [
            ("a 5 * add lockstep.io/replicas=9", "9 replicas"),
            ("a 5 * add lockstep.io/replicas=two", "not a number"),
            (
                "a 5 * add lockstep.io/failure-mode=maybe",
                "not a failure mode",
            ),
            ("a 5 * add lockstep.io/replica=2", "not known"),
            ("a 5 env( add r=1", "column 4"),
        ] {
            let fault = checked(rule(text)).unwrap_err();
            assert!(fault.message.contains(part), "{fault}");
        }
        let good = checked(rule(
            "a 5 storageos.com/replicas=1 add storageos.com/replicas=2",
        ))
        .unwrap();
        assert_eq!(good.selector, "lockstep.io/replicas==1");
        assert_eq!(good.labels, labels("lockstep.io/replicas=2"));
        assert!(checked(rule("a 5 * remove lockstep.io/replicas")).is_ok());
    }

    proptest! {
        #[test]
        fn people_win_and_the_order_in_which_rules_are_stored_does_not_matter(
            words in prop::collection::vec(
                ("[a-d]", -2..3i32, "\\*|[x-z]|![x-z]|[x-z]==[01]", "add|remove", "[x-z]=[01]?"), 0..6),
            own in prop::collection::btree_map("[x-z]", "[01]", 0..3),
            turn in 0..6usize,
        ) {
            let mut rules: Vec<RuleRecord> = words
                .iter()
                .enumerate()
                // Names are unique in a namespace.
                .map(|(i, (n, w, s, a, l))| rule(&format!("{n}{i} {w} {s} {a} {l}")))
                .collect();
            let given = evaluate(&rules, &own).unwrap();
            prop_assert!(given.keys().all(|k| !own.contains_key(k)));
            for (key, label) in &given {
                let source = rules.iter().find(|r| r.name == label.rule).unwrap();
                prop_assert_eq!(source.action, Action::Add);
                prop_assert_eq!(source.labels.get(key), Some(&label.value));
            }
            let turn = turn % rules.len().max(1);
            rules.rotate_left(turn);
            prop_assert_eq!(evaluate(&rules, &own).unwrap(), given);
        }
    }
}

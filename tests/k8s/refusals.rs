//! Whom the controller gives no certificate, tried on a real API server: each refusal stands on the
//! object with its reason, and nothing refused is ever signed, also not if somebody approves it.
//!
//! What only the end of an issuer brings (`IssuerExpired`, `CannotSign`) is tried beside the code.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    askers::{Place, Who, asker},
    ground::{Need, PATIENCE, Test, ground},
    install::{AUTHORITIES, NAMESPACE, agent_on, diagnosis, scale, wait_installed},
    requests::{Asked, Requests, token_of},
    talk::both,
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "refusals::whoever_may_not_have_a_certificate_is_told_why_and_gets_none",
        needs: &[Need::Nodes, Need::Image],
        run: whoever_may_not_have_a_certificate_is_told_why_and_gets_none,
    },
    Test {
        name: "refusals::a_node_with_too_many_open_requests_waits_for_their_answers",
        needs: &[Need::Nodes, Need::Image],
        run: a_node_with_too_many_open_requests_waits_for_their_answers,
    },
];

/// One request. In its names SELF, AWAY, OUTSIDE and ENDED are accounts: of a pod of the near node
/// that is in the mesh, of the far node, of the near one outside of the mesh, of one that has ended.
struct Row {
    what: &'static str,
    who: Who,
    /// Makes it of the right one.
    asked: fn(Asked) -> Asked,
    refused: Refused,
}

#[derive(Clone, Copy, Debug)]
enum Refused {
    /// By a sentence of the API server's: nobody else ever sees it.
    AtTheDoor(&'static str),
    /// For what is in it: controller and signer both find that.
    ForItself(&'static str),
    /// For what the controller knows besides.
    ForWhoRunsWhere(&'static str),
}

const fn asks(what: &'static str, asked: fn(Asked) -> Asked, reason: &'static str) -> Row {
    Row {
        what,
        who: Who::Agent,
        asked,
        refused: Refused::ForItself(reason),
    }
}

const fn asks_by(what: &'static str, who: Who, refused: Refused) -> Row {
    Row {
        what,
        who,
        asked: |right| right,
        refused,
    }
}

const fn asks_for(what: &'static str, asked: fn(Asked) -> Asked) -> Row {
    Row {
        what,
        who: Who::Agent,
        asked,
        refused: Refused::ForWhoRunsWhere("NotOnNode"),
    }
}

fn named(right: Asked, names: &str) -> Asked {
    Asked {
        names: names.to_owned(),
        ..right
    }
}

#[rustfmt::skip]
const ROWS: &[Row] = &[
    // Who asks.
    asks_by("administrator", Who::Administrator, Refused::ForItself("NotAnAgent")),
    asks_by("unbound", Who::Unbound, Refused::ForItself("UnboundToken")),
    asks_by("nobody", Who::Nobody, Refused::ForWhoRunsWhere("UnknownAgent")),
    asks_by("former", Who::Former, Refused::ForWhoRunsWhere("UnknownAgent")),
    asks_by("elsewhere", Who::Elsewhere, Refused::ForWhoRunsWhere("WrongAgent")),
    asks_by("another", Who::Another, Refused::ForWhoRunsWhere("WrongAgent")),
    // For whom.
    asks_for("away", |right| named(right, "URI:AWAY")),
    asks_for("outside", |right| named(right, "URI:OUTSIDE")),
    asks_for("ended", |right| named(right, "URI:ENDED")),
    // Under which names.
    asks("two-uris", |right| named(right, "URI:SELF,URI:SELF"), "WrongNames"),
    asks("dns", |right| named(right, "DNS:default.example.com"), "WrongNames"),
    asks("uri-and-dns", |right| named(right, "URI:SELF,DNS:default.example.com"), "WrongNames"),
    asks("no-workload", |right| named(right, "URI:https://example.com/"), "WrongNames"),
    asks("subject", |right| Asked { subject: "/CN=default", ..right }, "WrongNames"),
    asks("domain", |right| named(right, "URI:spiffe://example.com/ns/default/sa/default"), "WrongTrustDomain"),
    // With which key and for what.
    asks("p384", |right| Asked { key: "ec -pkeyopt ec_paramgen_curve:secp384r1", ..right }, "WrongKey"),
    asks("rsa", |right| Asked { key: "rsa:2048", ..right }, "WrongKey"),
    asks("authority", |right| Asked { extension: "basicConstraints=critical,CA:TRUE", ..right }, "AsksForAuthority"),
    asks("policies", |right| Asked { extension: "certificatePolicies=1.2.3.4", ..right }, "Malformed"),
    asks("one-usage-less", |right| Asked { usages: &["digital signature", "client auth"], ..right }, "WrongUsages"),
    asks("one-usage-more", |right| Asked { usages: &["digital signature", "client auth", "server auth", "cert sign"], ..right }, "WrongUsages"),
    asks("too-long", |right| Asked { seconds: Some(86_401), ..right }, "WrongLife"),
    asks("no-end", |right| Asked { seconds: None, ..right }, "WrongLife"),
    // In which shape.
    asks("twice", |right| Asked { then: "cat request request > both; mv both request", ..right }, "Malformed"),
    asks("large", |right| Asked { then: "head -c 20000 /dev/zero | tr '\\0' x >> request", ..right }, "Malformed"),
    Row {
        what: "nonsense",
        who: Who::Agent,
        asked: |right| Asked { then: "echo nonsense > request", ..right },
        refused: Refused::AtTheDoor("CERTIFICATE REQUEST"),
    },
    Row {
        what: "too-short",
        who: Who::Agent,
        asked: |right| Asked { seconds: Some(599), ..right },
        refused: Refused::AtTheDoor("less than 600 seconds"),
    },
];

/// Longer than the controller waits for what a watch may be late with.
const ANSWERED: Duration = Duration::from_secs(30);

fn whoever_may_not_have_a_certificate_is_told_why_and_gets_none() -> Result<()> {
    let ground = ground()?;
    let [near, far] = both(ground.own()?)?;
    let place = Place::new(&ground, "refusals")?;
    let (accounts, scratch) = (place.accounts(), tempfile::tempdir()?);
    let agents = [
        agent_on(&ground, near.name())?,
        agent_on(&ground, far.name())?,
    ];
    let by = |who: Who| asker(&ground, who, near.name(), &agents, scratch.path());
    let mut requests = Requests::new(&ground);

    // The control: what each row changes one thing of is right, and is signed.
    let right = requests.make(&by(Who::Agent)?, "right", &asked(|right| right, &accounts))?;
    requests.wait_issued(&right, ANSWERED)?;

    let mut mistakes = Vec::new();
    let mut made = Vec::new();
    for row in ROWS {
        let made_it = requests.make(&by(row.who)?, row.what, &asked(row.asked, &accounts));
        match (made_it, row.refused) {
            (Ok(name), Refused::ForItself(reason) | Refused::ForWhoRunsWhere(reason)) => {
                made.push((name, reason));
            }
            (Ok(name), Refused::AtTheDoor(_)) => mistakes.push(format!("{name} was let in")),
            (Err(e), Refused::AtTheDoor(sentence)) => {
                let said = format!("{e:#}");
                if !said.contains(sentence) {
                    mistakes.push(format!("{}: refused otherwise: {said}", row.what));
                }
            }
            (Err(e), Refused::ForItself(_) | Refused::ForWhoRunsWhere(_)) => {
                mistakes.push(format!("{}: not even asked: {e:#}", row.what));
            }
        }
    }
    for (name, reason) in &made {
        match requests.wait_reason(name, "Denied", ANSWERED) {
            Ok(said) if said == *reason => {}
            Ok(said) => mistakes.push(format!("{name}: {said} instead of {reason}")),
            Err(e) => mistakes.push(format!("{name}: {e:#}")),
        }
    }
    let issued = requests.issued()?;
    ensure!(
        mistakes.is_empty() && issued == [&*right],
        "issued: {issued:?}\n{}\n{}",
        mistakes.join("\n"),
        diagnosis(&ground)
    );
    let reasons: HashSet<&str> = made.iter().map(|(_, reason)| *reason).collect();
    eprintln!(
        "{} requests were denied for {} reasons",
        made.len(),
        reasons.len()
    );

    // The signer believes no approval for what it can see itself.
    let [controller, _] = AUTHORITIES;
    scale(&ground, controller, 0)?;
    let approve = |name: &str| ground.kubectl().run(&["certificate", "approve", name]);
    let right = requests.make(
        &by(Who::Agent)?,
        "right-by-hand",
        &asked(|right| right, &accounts),
    )?;
    // The control: somebody who may has approved it, and nobody else is needed.
    approve(&right)?;
    requests.wait_issued(&right, ANSWERED)?;
    let mut approved = Vec::new();
    for row in ROWS {
        if let Refused::ForItself(reason) = row.refused {
            let name = format!("{}-by-hand", row.what);
            let name = requests.make(&by(row.who)?, &name, &asked(row.asked, &accounts))?;
            approve(&name)?;
            approved.push((name, reason));
        }
    }
    for (name, reason) in &approved {
        match requests.wait_reason(name, "Failed", ANSWERED) {
            Ok(said) if said == *reason => {}
            Ok(said) => mistakes.push(format!("{name}: {said} instead of {reason}")),
            Err(e) => mistakes.push(format!("{name}: {e:#}")),
        }
        if requests.is_issued(name)? {
            mistakes.push(format!("{name} was signed"));
        }
    }
    ensure!(
        mistakes.is_empty(),
        "{}\n{}",
        mistakes.join("\n"),
        diagnosis(&ground)
    );
    Ok(())
}

fn a_node_with_too_many_open_requests_waits_for_their_answers() -> Result<()> {
    const MOST: usize = 1;
    // So many for one account count as one.
    const REPEATS: usize = 8;
    let ground = ground()?;
    let [near, _] = both(ground.own()?)?;
    let place = Place::new(&ground, "pending")?;
    let (accounts, scratch) = (place.accounts(), tempfile::tempdir()?);
    let [controller, signer] = AUTHORITIES;
    let setting = format!("PICOMESH_NODE_REQUESTS={MOST}");
    let deployment = format!("deployment/{controller}");
    let set = ["set", "env", &deployment, "-n", NAMESPACE, &setting];
    ground.kubectl().run(&set)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    // What is approved stays open for want of a signature.
    scale(&ground, signer, 0)?;

    let agent = token_of(&ground, &agent_on(&ground, near.name())?, scratch.path())?;
    let mut requests = Requests::new(&ground);
    let mut open = Vec::new();
    for index in 0..MOST * REPEATS {
        let name = format!("open{index}");
        let name = requests.make(&agent, &name, &asked(|right| right, &accounts))?;
        requests.wait_reason(&name, "Approved", ANSWERED)?;
        open.push(name);
    }
    let one_more = requests.make(&agent, "one-more", &asked(|right| right, &accounts))?;
    let reason = requests.wait_reason(&one_more, "Denied", ANSWERED)?;
    ensure!(reason == "TooManyPending", "it was denied for {reason}");

    // The control: the others were as good as that, and so is the next one when they are answered.
    scale(&ground, signer, 2)?;
    for name in &open {
        requests.wait_issued(name, PATIENCE)?;
    }
    let next = requests.make(&agent, "next", &asked(|right| right, &accounts))?;
    requests.wait_issued(&next, ANSWERED)?;
    ensure!(
        !requests.is_issued(&one_more)?,
        "what was denied has a certificate"
    );
    Ok(())
}

fn asked(change: fn(Asked) -> Asked, accounts: &[(&str, String)]) -> Asked {
    let mut asked = change(named(Asked::default(), "URI:SELF"));
    for (stands_for, identity) in accounts {
        asked.names = asked.names.replace(stands_for, identity);
    }
    asked
}

//! The agent's datapath on real namespaces: what it puts into a pod and takes out again
//! ([`devices`]), and a pod's whole way with programs and sockets ([`pods`]).

mod agent;
mod devices;
mod pods;
mod world;

use libtest_mimic::{Completion, Trial};

type Test = (&'static str, fn() -> anyhow::Result<()>);

/// `missing`: why the tests cannot run here.
pub(crate) fn trials(missing: Option<&str>) -> Vec<Trial> {
    devices::TESTS
        .into_iter()
        .chain(pods::TESTS)
        .map(|(name, test)| {
            let missing = missing.map(str::to_owned);
            Trial::ignorable_test(format!("datapath::{name}"), move || match missing {
                Some(reason) => Ok(Completion::ignored_with(reason)),
                None => crate::completion(test()),
            })
        })
        .collect()
}

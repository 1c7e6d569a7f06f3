import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasProgram } from './programs.ts'
import { reference, simulator, type Subject } from './tpm-pair.ts'
import { scenarios } from './tpm-scenarios/index.ts'
import { Recorder, type Scenario } from './tpm-scenarios/recorder.ts'

/** What a scenario saw on a TPM that has just left its factory. */
const seenOn = async (subject: Subject, scenario: Scenario): Promise<readonly unknown[]> => {
  await subject.renew()
  const on = new Recorder(subject)
  await scenario(on)
  return on.seen
}

/** The same commands to both: swtpm decides what is right. */
describe.skipIf(!hasProgram('swtpm'))('the software TPM answers as swtpm does', () => {
  let both: readonly Subject[]
  beforeAll(async () => {
    both = [await reference(), await simulator()]
  })
  afterAll(async () => {
    for (const one of both) await one.stop()
  })
  test.each(Object.entries(scenarios))('%s', async (_, scenario) => {
    const [theirs, ours] = [await seenOn(both[0] as Subject, scenario), await seenOn(both[1] as Subject, scenario)]
    expect(ours).toEqual(theirs)
    expect(theirs.length).toBeGreaterThan(10)
  })
})

import { describe, expect, test } from 'vitest'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { actions, authorise, type Action } from './authorise.ts'
import type { Caller } from './caller.ts'
import { refusalCounter } from './refusals.ts'

const callers: readonly (readonly [string, Caller])[] = [
  ...(['owner', 'operator', 'factory', 'auditor'] as const).map((role): readonly [string, Caller] => [
    role,
    { kind: 'operator', id: 'alice', roles: [role], from: 'test' },
  ]),
  ...(['system', 'device', 'unidentified'] as const).map((kind): readonly [string, Caller] => [kind, { kind, id: 'x', from: 'test' } as Caller]),
]

/** Written out a second time: a change of the table must be meant. */
const only: Readonly<Record<string, readonly string[]>> = {
  auditor: ['audit.read', 'fleet.read'],
  factory: ['batch.import', 'fleet.read', 'release.import'],
  unidentified: ['device.connect', 'device.hold', 'device.message', 'enrol.answer', 'enrol.hello', 'enrol.issue', 'est.enrol', 'seal.unseal'],
  device: [
    'device.acknowledge',
    'device.connect',
    'device.evidence',
    'device.hold',
    'device.message',
    'device.renew',
    'device.report',
    'device.trust',
    'enrol.answer',
    'enrol.hello',
    'enrol.issue',
    'est.reenrol',
    'key.deliver',
  ],
  system: [
    'alert.deliver',
    'alert.raise',
    'appraisal.settle',
    'audit.summary',
    'batch.settle',
    'ca.settle',
    'campaign.step',
    'certificate.remove',
    'crl.publish',
    'device.quarantine',
    'device.reinstate',
    'device.report',
    'device.revoke',
    'device.suspend',
    'enrol.sweep',
    'firmware.approve',
    'group.follow',
    'group.place',
    'kek.settle',
    'key.broadcast',
    'key.deliver',
    'key.destroy',
    'key.rotate',
    'ledger.settle',
    'ocsp.responder',
    'rotation.settle',
    'server.setup',
  ],
  operator: [
    'alert.test',
    'batch.reinstate',
    'batch.revoke',
    'batch.suspend',
    'campaign.abort',
    'campaign.advance',
    'campaign.pause',
    'campaign.resume',
    'campaign.retry',
    'campaign.rollback',
    'device.attest',
    'device.recover',
    'device.reinstate',
    'device.revoke',
    'device.suspend',
    'device.tag',
    'enrolment-token.create',
    'enrolment-token.revoke',
    'fleet.read',
    'group.change',
    'group.create',
    'group.query',
    'key.create',
    'key.grant',
    'key.policy',
    'key.rotate',
    'key.topics',
  ],
}

const mayDo = (caller: Caller): string[] =>
  (Object.keys(actions) as Action[])
    .filter((action) => {
      try {
        authorise(caller, action)
        return true
      } catch (thrown) {
        if (!(thrown instanceof Problem) || thrown.code !== 'forbidden') throw thrown
        return false
      }
    })
    .toSorted()

describe('who may do what', () => {
  test.each(callers.filter(([name]) => name !== 'owner'))('%s', (name, caller) => expect(mayDo(caller)).toEqual(only[name]))
  test('an owner may do everything that is not for machines', () => {
    const [, owner] = callers[0] ?? []
    if (owner === undefined) throw new Error('no owner')
    const machines = new Set([...(only['system'] ?? []), ...(only['device'] ?? []), ...(only['unidentified'] ?? [])])
    const both = new Set(['key.rotate', 'device.revoke', 'device.suspend', 'device.reinstate'])
    expect(mayDo(owner)).toEqual((Object.keys(actions) as string[]).filter((action) => !machines.has(action) || both.has(action)).toSorted())
  })
  test('an operator without a role may do nothing', () => expect(mayDo({ kind: 'operator', id: 'bob', roles: [], from: 'test' })).toEqual([]))
})

describe('refusals of strangers', () => {
  const problem = (reason: string) => ({ code: 'malformed', reason, message: 'x'.repeat(1000) })
  const intent = (from: string) => ({ caller: { from }, action: 'device.message', subject: 'e-1' })

  test('100,000 of 10,000 kinds: one bounded summary', () => {
    const counter = refusalCounter()
    for (let count = 0; count < 100_000; count++) counter.count(intent(`10.${count % 100}.${Math.floor(count / 100) % 100}.0/24`), problem('cose.tag'), 0)
    const summary = counter.take() ?? ''
    expect(summary.length).toBeLessThan(64 * 400)
    expect(summary).toMatch(/99360 × other$/)
    expect(counter.take()).toBeUndefined()
  })

  test('counted by kind, with the first as an example', () => {
    const counter = refusalCounter()
    for (let count = 0; count < 3; count++) counter.count(intent('10.0.0.0/24'), problem('cose.tag'), 0)
    counter.count(intent('10.0.0.0/24'), problem('message.size'), 0)
    expect(counter.take()).toMatch(/^3 × device.message cose.tag from 10.0.0.0\/24 \(first: e-1: x+\); 1 × device.message message.size/)
  })
})

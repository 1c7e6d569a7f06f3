import { randomBytes } from 'node:crypto'
import { beforeEach, describe, expect, test } from 'vitest'
import { openBoundKeys, type BoundKeys } from '@fleetkey/device-agent/bound-keys.ts'
import { openDocument, type Document } from '@fleetkey/device-agent/files.ts'
import { memoryFileSystem, type MemoryFileSystem } from '@fleetkey/device-agent/memory-filesystem.ts'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { ApprovalSet } from '@fleetkey/protocol/messages.ts'
import { provision } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { approver } from './approver.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const maker = approver()
let software: SoftwareTpm
let files: MemoryFileSystem
let lines: string[]
let steps: string[]

beforeEach(() => {
  software = createSoftwareTpm({ random, now: () => Date.now() })
  files = memoryFileSystem()
  lines = []
  steps = []
})
const document = (name: string): Document => openDocument({ files, folder: '/data', name, step: () => undefined })
const tpmOf = (): Tpm => new Tpm(software.transport(), { random })
const open = async (step: (name: string) => void = (name) => void steps.push(name)): Promise<BoundKeys> =>
  await openBoundKeys({ tpm: tpmOf(), blobs: document('tpm-keys'), approvals: document('approvals'), step, log: (line) => void lines.push(line) })

/** What the server says of the firmware that this TPM runs. */
const running = async (ref?: Uint8Array, release = 'gateway/1', number = 1): Promise<ApprovalSet> => {
  const { signer, ref: of, approvals } = await maker.running(tpmOf(), ref)
  return { signer, ref: of, approvals: approvals.map((one) => ({ ...one, pcrs: [...one.pcrs], release, number })) }
}
const other = (number: number, ref?: Uint8Array): ApprovalSet => {
  const policy = maker.policy(ref)
  const approval = maker.approval(random(32), policy.ref)
  return { ...policy, approvals: [{ ...approval, pcrs: [...approval.pcrs], release: `gateway/${number}`, number }] }
}
const stored = async (): Promise<{ sets: ApprovalSet[] }> => decode((await document('approvals').load()) ?? new Uint8Array()) as { sets: ApprovalSet[] }

describe('the keys of a device, bound to firmware', () => {
  test('first start: the LDevID key alone; the pair comes with the policy, is kept, and opens once its firmware is approved', async () => {
    const bound = await open()
    expect([bound.known, bound.device, bound.pairs.length, steps]).toEqual([false, null, 0, ['tpm-keys.stored']])
    const recipient = await bound.recipientFor(maker.policy())
    expect(await bound.recipientFor(maker.policy())).toEqual(recipient)
    const again = await open()
    expect([again.known, again.pairs.length]).toEqual([true, 1])
    expect(await again.recipientFor(maker.policy())).toEqual(recipient)
    const [pair] = again.pairs
    if (pair === undefined) throw new Error('no pair')
    expect(await again.open(pair)).toBeUndefined()
    await again.learn(await running())
    const storage = (await again.open(pair))?.bytes()
    expect(storage).toHaveLength(32)
    // Approvals are remembered: the next start needs nobody.
    const third = await open()
    const [kept] = third.pairs
    expect(kept === undefined ? undefined : (await third.open(kept))?.bytes()).toEqual(storage)
  })

  test('approvals of one policy add up, whatever order they come in; the newest policies are kept', async () => {
    const bound = await open()
    await bound.learn(other(2))
    await bound.learn(other(1))
    const third = await running(undefined, 'gateway/3', 3)
    await bound.learn(third)
    expect((await stored()).sets.map(({ approvals }) => approvals.map(({ number }) => number))).toEqual([[3, 2, 1]])
    const before = steps.length
    await bound.learn(third)
    expect(steps.length).toBe(before)
    for (let generation = 2; generation < 8; generation++) await bound.learn(other(generation, new Uint8Array(32).fill(generation)))
    expect((await stored()).sets.map(({ ref }) => ref[0])).toEqual([7, 6, 5, 4])
  })

  test('settled: one pair, its device, and no older pair on either copy', async () => {
    const bound = await open()
    const old = await bound.recipientFor(maker.policy())
    await bound.settle('gw-1')
    await bound.recipientFor(maker.policy(new Uint8Array(32).fill(2)))
    expect(bound.pairs).toHaveLength(2)
    await bound.settle('gw-1')
    expect([bound.pairs.length, bound.device]).toEqual([1, 'gw-1'])
    const copies = [...files.contents()].filter(([path]) => path.includes('tpm-keys.') && !path.endsWith('.new'))
    expect(copies).toHaveLength(2)
    for (const [path, content] of copies) expect(Buffer.from(content).includes(old.private), path).toBe(false)
  })

  test('a pair that never came into force is overtaken, the one in force stays', async () => {
    const bound = await open()
    const first = await bound.recipientFor(maker.policy())
    await bound.settle('gw-1')
    for (let generation = 2; generation < 7; generation++) await bound.recipientFor(maker.policy(new Uint8Array(32).fill(generation)))
    expect(bound.pairs.map(({ policy }) => policy.ref[0])).toEqual([6, 5, 1])
    expect(bound.pairs.at(-1)?.recipient).toEqual(first)
  })

  test('keys from before they were bound: said, the LDevID key stays, the rest is made anew', async () => {
    const { ldevid } = await provision(tpmOf())
    const unbound = { public: random(64), private: random(64) }
    await document('tpm-keys').replace(encode({ v: 1, ldevid, recipient: unbound, storage: unbound }))
    const bound = await open()
    expect([bound.known, bound.device, bound.pairs.length]).toEqual([true, null, 0])
    expect(lines.join()).toMatch(/not bound to firmware: this device returns to its server with the same LDevID key/)
    expect(bound.keys.publics.ldevid).toEqual(ldevid.public)
    await bound.recipientFor(maker.policy())
    // Said once, and nothing of the old keys is left.
    lines = []
    expect([(await open()).pairs.length, lines]).toEqual([1, []])
    for (const [path, content] of files.contents()) if (!path.endsWith('.new')) expect(Buffer.from(content).includes(unbound.private), path).toBe(false)
  })

  test('a TPM that was cleared: enrols anew, with keys that nobody knows', async () => {
    const bound = await open()
    await bound.recipientFor(maker.policy())
    await tpmOf().clear()
    const cleared = await open()
    expect([cleared.known, cleared.pairs.length]).toEqual([false, 0])
    expect(cleared.keys.publics.ldevid).not.toEqual(bound.keys.publics.ldevid)
  })

  test('approvals that do not read are none: locked, not broken', async () => {
    const bound = await open()
    await bound.recipientFor(maker.policy())
    await bound.learn(await running())
    for (const content of [encode({ v: 1, sets: 'x' }), encode({ v: 2 }), random(40)]) {
      await document('approvals').replace(content)
      const again = await open()
      const [pair] = again.pairs
      expect(pair === undefined ? 'none' : await again.open(pair)).toBeUndefined()
      expect(lines.at(-1)).toMatch(/^stored approvals are not readable/)
      await again.learn(await running())
      expect(pair === undefined ? 'none' : await again.open(pair)).toBeDefined()
    }
  })

  test('that the identity at rest was replaced is remembered until it is not', async () => {
    const bound = await open()
    await bound.replaced(true)
    expect((await open()).isReplaced).toBe(true)
    await (await open()).replaced(false)
    expect((await open()).isReplaced).toBe(false)
  })

  test('a policy whose signer is no public area is refused', async () => {
    const bound = await open()
    await expect(bound.recipientFor({ signer: random(40), ref: random(32) })).rejects.toThrow()
    expect(bound.pairs).toHaveLength(0)
  })
})

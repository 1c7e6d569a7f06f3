import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { hasProgram } from './programs.ts'
import { bytesFor, classOf, dice, kinds, mutate, prepare, undo, type Dice, type Ground } from './tpm-mutations.ts'
import { deviationOf, notOurs } from './tpm-deviations.ts'
import { reference, simulator, type Subject } from './tpm-pair.ts'
import { ScriptTpm } from './tpm-script.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const share = process.env['FLEETKEY_LONG'] === '1' ? 1 : 50
const seed = Number(process.env['FLEETKEY_SEED'] ?? randomBytes(4).readUInt32BE())
const rcOf = (response: Uint8Array): number => Buffer.from(response).readUInt32BE(6)

/** A response: a tag, its own size, a code, and nothing behind a code that is not success. */
const isWellFormed = (response: Uint8Array): boolean => {
  const bytes = Buffer.from(response)
  if (bytes.length < 10 || bytes.readUInt32BE(2) !== bytes.length) return false
  return bytes.readUInt32BE(6) === 0 ? [0x8001, 0x8002].includes(bytes.readUInt16BE(0)) : bytes.length === 10 && bytes.readUInt16BE(0) === 0x8001
}

/** Codes of the commands that a TPM says it has (TPM2_GetCapability of TPM_CAP_COMMANDS). */
const commandsOf = async ({ tpm }: Subject): Promise<ReadonlySet<number>> => {
  const response = Buffer.from(await tpm.raw(Buffer.from('8001000000160000017a000000020000011f00000100', 'hex')))
  expect(rcOf(response)).toBe(0)
  const list = response.subarray(19)
  expect(list.length).toBe(4 * response.readUInt32BE(15))
  return new Set(Array.from({ length: list.length / 4 }, (_, at) => list.readUInt32BE(4 * at) & 0xffff))
}

interface Pair {
  readonly subjects: readonly [Subject, Subject]
  grounds: readonly [Ground, Ground]
}

const renew = async (subjects: readonly [Subject, Subject]): Promise<readonly [Ground, Ground]> => {
  for (const one of subjects) await one.renew()
  return [await prepare(subjects[0], random), await prepare(subjects[1], random)]
}

interface Run {
  readonly command: Uint8Array
  readonly response: Uint8Array
}

/** The same change to the command of each TPM. */
const runs = async ({ subjects, grounds }: Pair, which: number, change: (bytes: Uint8Array) => Uint8Array): Promise<readonly [Run, Run]> => {
  const one = async (subject: Subject, ground: Ground): Promise<Run> => {
    const command = change(bytesFor(which, ground))
    return { command, response: await subject.tpm.raw(command) }
  }
  return await Promise.all([one(subjects[0], grounds[0]), one(subjects[1], grounds[1])])
}

/** Brings both back to where they were, or starts over. */
const settle = async (pair: Pair, both: readonly [Run, Run], same: boolean): Promise<void> => {
  const failed = same && rcOf(both[0].response) !== 0
  if (failed) return
  const undone = same && (await undo(pair.subjects[0], pair.grounds[0], both[0])) && (await undo(pair.subjects[1], pair.grounds[1], both[1]))
  if (!undone) pair.grounds = await renew(pair.subjects)
}

/**
 * One mutated command to both; what differs in class without being in the table, told. Where a cut makes key bytes stand for a size, or a byte is set to what it
 * was on one of them, chance decides: what differs is tried again on other keys, and told only when it always differs.
 */
const step = async (pair: Pair, roll: Dice): Promise<string | undefined> => {
  const which = roll(kinds)
  // Contexts are longer on swtpm; what is changed must be there on both.
  const change = mutate(roll, Math.min(...pair.grounds.map((ground) => bytesFor(which, ground).length)))
  let told: string | undefined
  for (let attempt = 0; attempt < 4; attempt++) {
    const both = await runs(pair, which, change)
    const [theirs, ours] = [rcOf(both[0].response), rcOf(both[1].response)]
    const { command, response } = both[1]
    if (!isWellFormed(response)) return `not a response: ${Buffer.from(response).toString('hex')}`
    const same = classOf(theirs) === classOf(ours)
    await settle(pair, both, same)
    if (same || deviationOf(command, theirs, ours) !== undefined) return undefined
    told = `swtpm ${theirs.toString(16)}, ours ${ours.toString(16)}: ${Buffer.from(command).toString('hex')}`
  }
  return told
}

describe('mutated commands', () => {
  test('nothing that comes in gets anything but a well-formed response', async () => {
    const count = 500_000 / share
    const roll = dice(seed)
    let now = 0
    const tpm = createSoftwareTpm({ random, now: () => now })
    const subject: Subject = {
      name: 'simulator',
      tpm: new ScriptTpm(async (bytes) => tpm.execute(bytes)),
      init: async () => undefined,
      setLocality: async () => undefined,
      renew: async () => undefined,
      stop: async () => undefined,
    }
    const ground = await prepare(subject, random)
    for (let at = 0; at < count; at++) {
      now += 10_000
      const original = bytesFor(roll(kinds), ground)
      const changed = mutate(roll, original.length)(original)
      // Half of them with a header that lies about the size, some cut anywhere.
      const bytes = roll(2) === 0 ? changed : changed.subarray(0, roll(changed.length + 1))
      const response = tpm.execute(bytes)
      if (!isWellFormed(response)) throw new Error(`seed ${seed}: ${Buffer.from(bytes).toString('hex')} got ${Buffer.from(response).toString('hex')}`)
      // TPM_RC_FAILURE would be an exception of ours that nobody foresaw.
      expect(rcOf(response), Buffer.from(bytes).toString('hex')).not.toBe(0x101)
    }
  }, 600_000)
})

describe.skipIf(!hasProgram('swtpm'))('mutated commands in lock step with swtpm', () => {
  let pair: Pair
  beforeAll(async () => {
    const subjects = [await reference(), await simulator()] as const
    pair = { subjects, grounds: await renew(subjects) }
  })
  afterAll(async () => {
    for (const one of pair.subjects) await one.stop()
  })

  test('are of commands that both have, or that are known to be missing', async () => {
    const [theirs, ours] = [await commandsOf(pair.subjects[0]), await commandsOf(pair.subjects[1])]
    expect([...theirs.difference(ours)].toSorted((one, other) => one - other)).toEqual([...notOurs])
  })

  test('get the same class of answer', async () => {
    const count = 100_000 / share
    console.log(`${count} mutated commands, FLEETKEY_SEED=${seed}`)
    const roll = dice(seed)
    const different: string[] = []
    for (let at = 0; at < count && different.length < 20; at++) {
      if (at % 500 === 499) pair.grounds = await renew(pair.subjects)
      const told = await step(pair, roll)
      if (told !== undefined) different.push(told)
    }
    expect(different, `FLEETKEY_SEED=${seed}`).toEqual([])
  }, 3_600_000)
})

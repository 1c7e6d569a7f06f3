import { createECDH } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { openConnection, type Connection } from '@fleetkey/device-agent/connection.ts'
import { openDeviceClock } from '@fleetkey/device-agent/device-clock.ts'
import { enrol, Refused } from '@fleetkey/device-agent/enrol.ts'
import { openTrust } from '@fleetkey/device-agent/trust.ts'
import type { Board } from '@fleetkey/firmware-sim/board/board.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { AnswerOf, BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { alg, attribute, handle } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision, type DeviceKeys } from '@fleetkey/tpm2/device-keys.ts'
import { marshalEventLog, parseEventLog } from '@fleetkey/tpm2/event-log.ts'
import { marshalPublic, parsePublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { dial } from './mqtt-wire.ts'
import { openWorld, random, until, type Machine, type World } from './world.ts'

type Proven = AnswerOf<'tpm2'>['proven']
type Simulated = Machine & { readonly board: Board }

/** The whole server, over MQTT and TLS, attacked by somebody who has an agent's code and a genuine board or two. */
let world: World
let boards: readonly Simulated[]
let taken = 0
/** The record of a device takes a refusal every few seconds; the server's clock is moved instead of waiting. */
const clock = { ahead: 0 }

beforeAll(async () => {
  world = await openWorld({ now: () => Date.now() + clock.ahead })
  boards = await Promise.all(Array.from({ length: 28 }, async (_, index) => await world.simulated(`GW-${index + 1}`)))
  await world.enlist(boards, 'plant')
}, 120_000)
afterAll(async () => await world.stop())

/** A genuine board that nothing has happened to yet, and its keys. */
const genuine = async (): Promise<{ machine: Simulated; keys: DeviceKeys; id: string }> => {
  const machine = boards[taken++]
  if (machine === undefined) throw new Error('more boards are needed')
  return { machine, keys: await keysOf(machine), id: machine.serial.toLowerCase() }
}
const keysOf = async (machine: Machine): Promise<DeviceKeys> => {
  const tpm = new Tpm(await machine.openTpm(), { random })
  return await openDeviceKeys(tpm, await provision(tpm))
}

interface Attack {
  readonly keys: DeviceKeys
  readonly machine: Machine
  readonly serial?: string
  readonly port?: number
  readonly eventLog?: (log: Uint8Array) => Uint8Array
  readonly proven?: (of: Proven) => Proven
  /** The exporter that the device computes its nonce over. */
  readonly exporter?: Uint8Array
  /** Sees each message as it leaves. */
  readonly wiretap?: (client: string, bytes: Uint8Array) => void
}

const deviceClock = () => openDeviceClock({ wall: () => Date.now(), monotonic: () => performance.now() })
const connectTo =
  (port: number) =>
  async (of: Pick<Parameters<typeof openConnection>[0], 'client' | 'credentials' | 'topics' | 'onMessage' | 'onClose'>): Promise<Connection> => {
    const { tenant, trust } = trustOfBundle(world.bundle)
    return await openConnection({ server: { host: '127.0.0.1', port }, trust: openTrust(trust), time: deviceClock().belief(), tenant, ...of })
  }

/** One enrolment as the attack has it: `admitted`, or the public code of the refusal. */
const attempt = async (of: Attack): Promise<string> => {
  const { tenant, trust } = trustOfBundle(world.bundle)
  const attester = tpm2Attester(of.keys)
  const changed: Attester = {
    ...attester,
    answer: async (challenged) => {
      const answer = await attester.answer(challenged)
      return { ...answer, proven: of.proven?.(answer.proven) ?? answer.proven }
    },
  }
  try {
    await enrol({
      connect: async (options) => {
        const connection = await connectTo(of.port ?? world.server.mqttPort)(options)
        const send = async (bytes: Uint8Array): Promise<void> => {
          of.wiretap?.(connection.client, bytes)
          await connection.send(bytes)
        }
        return { ...connection, exporter: of.exporter ?? connection.exporter, send }
      },
      attester: changed,
      trust: openTrust(trust),
      tenant,
      serial: of.serial ?? of.machine.serial,
      purpose: 'enrol',
      known: null,
      agent: 'attacker',
      eventLog: async () => of.eventLog?.(of.machine.eventLog()) ?? of.machine.eventLog(),
      random,
      clock: deviceClock(),
      step: () => undefined,
    })
    return 'admitted'
  } catch (thrown) {
    if (thrown instanceof Refused) return thrown.code
    throw thrown
  }
}

const deviceOf = async (id: string) => await world.client.call('device.show', { params: { id } })

/** What became of an attack on this device: the public code, the private reason on its record, and the state it is in afterwards. */
const outcome = async (attack: Attack, id: string) => {
  clock.ahead += 6_000
  const code = await attempt(attack)
  const { state, lastRefusal } = await deviceOf(id)
  return { code, reason: lastRefusal?.reason, state }
}
/** Refusals of strangers stand on no device's record: the log counts them by reason, once a minute. What it says of them from here on. */
const counted = async (): Promise<() => Promise<string>> => {
  const summaries = async () =>
    (await world.client.call('audit.list', { query: { after: 0, limit: 1000 } })).items.filter(({ action }) => action === 'audit.summary')
  clock.ahead += 61_000
  const before = (await summaries()).length
  return async () => {
    clock.ahead += 61_000
    await until('the summary of the minute', async () => (await summaries()).length > before)
    return (await summaries())
      .slice(before)
      .map(({ detail }) => detail)
      .join('; ')
  }
}
const refused = (reason: string) => ({ code: 'attestation-failed', reason, state: 'registered' })

describe('firmware', () => {
  test('a tampered stage', async () => {
    const { machine, keys, id } = await genuine()
    machine.board.flash.tamper('kernel', (bytes) => bytes.map((byte, index) => (index === 0 ? byte ^ 1 : byte)))
    machine.board.boot()
    expect(await outcome({ machine, keys }, id)).toEqual(refused('reference.pcr-4'))
  })

  test('a stage that was not measured', async () => {
    const { machine, keys, id } = await genuine()
    const events = parseEventLog(machine.eventLog(), { maxEvents: 100, maxBytes: 1 << 16 })
    const skipped = events.filter(({ pcr }) => pcr !== 11)
    machine.board.tpm.powerCycle()
    for (const { pcr, digests } of skipped) machine.board.tpm.extend(pcr, digests.get(alg.sha256) ?? new Uint8Array(32))
    expect(await outcome({ machine, keys, eventLog: () => marshalEventLog(skipped) }, id)).toEqual(refused('reference.pcr-11'))
  })

  test('the log of a good boot for a bad one', async () => {
    const { machine, keys, id } = await genuine()
    const good = machine.eventLog()
    machine.board.flash.tamper('initrd', (bytes) => bytes.map((byte, index) => (index === 7 ? byte ^ 1 : byte)))
    machine.board.boot()
    expect(await outcome({ machine, keys, eventLog: () => good }, id)).toEqual(refused('log.replay.mismatch'))
  })

  test('the quote of an earlier, good boot', async () => {
    const { machine, keys, id } = await genuine()
    let quote: Proven['quote'] | undefined
    // The genuine board answers another challenge, and its answer never arrives.
    expect(await outcome({ machine, keys, exporter: random(32), proven: (of) => ({ ...of, quote: (quote = of.quote) }) }, id)).toEqual(
      refused('credential.proof'),
    )
    expect(await outcome({ machine, keys, proven: (of) => ({ ...of, quote: quote ?? of.quote }) }, id)).toEqual(refused('quote.nonce'))
    expect(await attempt({ machine, keys })).toBe('admitted')
  })

  test('a rollback to an older release below the minimum: quarantined, told why in private, back with the newer one', async () => {
    const { machine, id } = await genuine()
    const [old, next] = [world.build('1.0.0', 1), world.build('2.0.0', 2)]
    await world.importRelease(next)
    const group = 'rollback'
    await world.client.call('group.create', { body: { id: group } })
    await world.client.call('group.add', { params: { id: group }, body: { devices: [DeviceId.parse(id)] } })
    await world.client.call('group.policy.set', { params: { id: group }, body: { minimumRelease: 2 } })
    const run = async (release: typeof old): Promise<Agent> => {
      machine.board.flash.update(release)
      machine.board.boot()
      const agent = world.agent(machine)
      await until('connected', () => agent.status().connected, 60_000)
      return agent
    }
    let agent = await run(next)
    await until('it runs the newer release', async () => (await deviceOf(id)).release === 'gateway/2.0.0')
    await agent.stop()
    agent = await run(old)
    await until('quarantined', async () => (await deviceOf(id)).state === 'quarantined')
    expect(await deviceOf(id)).toMatchObject({ verdict: 'contraindicated', verdictReason: 'release.below-minimum', release: 'gateway/2.0.0' })
    // The device itself hears the public code only.
    await until('it was told', () => agent.status().lastRefusal !== null)
    expect(agent.status().lastRefusal).toBe('attestation-failed')
    // Without the policy its own floor still says so.
    await world.client.call('group.policy.set', { params: { id: group }, body: { minimumRelease: 0 } })
    await world.client.call('device.attest', { params: { id } })
    await until('judged anew', async () => (await deviceOf(id)).verdictReason === 'release.rollback')
    expect((await deviceOf(id)).state).toBe('quarantined')
    await agent.stop()
    agent = await run(next)
    await until('it is back', async () => (await deviceOf(id)).state === 'enrolled')
    await agent.stop()
  })

  test('PCRs of the SHA-1 bank', async () => {
    const { machine, keys, id } = await genuine()
    const quote: DeviceKeys['quote'] = async (selection, data) => {
      await keys.close()
      const tpm = new Tpm(await machine.openTpm(), { random })
      const ak = await tpm.createPrimary(handle.endorsement, templates.ak)
      const banks = selection.map(({ pcrs }) => ({ hash: alg.sha1, pcrs }))
      const quoted = await tpm.quote(ak, banks, data)
      await tpm.flush(ak.handle)
      return quoted
    }
    expect(await outcome({ machine, keys: { ...keys, quote } }, id)).toEqual(refused('quote.selection.bank'))
  })
})

describe('keys', () => {
  /** The TPM itself does not open a credential for an object that it does not hold; the attacker is left to guess. */
  const guessing =
    (mine: DeviceKeys): DeviceKeys['activate'] =>
    async (credential) => {
      await expect(mine.activate(credential)).rejects.toThrow()
      return random(32)
    }

  test('an AK of another TPM', async () => {
    const [{ machine, keys, id }, other] = [await genuine(), await genuine()]
    const { ak } = other.keys.publics
    const { quote, certify, make } = other.keys
    const attack: DeviceKeys = { ...keys, publics: { ...keys.publics, ak }, quote, certify, make, activate: guessing(keys) }
    expect(await outcome({ machine, keys: attack }, id)).toEqual(refused('credential.proof'))
  })

  test('the EK of one TPM, everything else of another', async () => {
    const [{ machine, keys, id }, other] = [await genuine(), await genuine()]
    const attack: DeviceKeys = {
      ...other.keys,
      publics: { ...other.keys.publics, ek: keys.publics.ek },
      ekName: keys.ekName,
      ekCertificate: keys.ekCertificate,
      activate: guessing(keys),
    }
    expect(await outcome({ machine, keys: attack }, id)).toEqual(refused('credential.proof'))
  })

  test('a software key that looks like an AK', async () => {
    const { machine, keys, id } = await genuine()
    const ak = softwareKey(templates.ak)
    expect(await outcome({ machine, keys: { ...keys, publics: { ...keys.publics, ak }, activate: guessing(keys) } }, id)).toEqual(refused('credential.proof'))
  })

  test('an AK that signs whatever it is given', async () => {
    const { machine, keys, id } = await genuine()
    await keys.close()
    const tpm = new Tpm(await machine.openTpm(), { random })
    const loose = await tpm.createPrimary(handle.endorsement, { ...templates.ak, attributes: templates.ak.attributes & ~attribute.restricted })
    await tpm.flush(loose.handle)
    const attack: DeviceKeys = { ...keys, publics: { ...keys.publics, ak: loose.public } }
    expect(await outcome({ machine, keys: attack }, id)).toEqual(refused('ak.attributes.not-restricted'))
    expect(await attempt({ machine, keys })).toBe('admitted')
  })

  test('a parent that the AK has not certified', async () => {
    const { machine, keys, id } = await genuine()
    const srk = softwareKey(templates.srk)
    expect(await outcome({ machine, keys: { ...keys, publics: { ...keys.publics, srk } } }, id)).toEqual(refused('key.parent-not-certified'))
  })

  const softwareKey = (template: typeof templates.ak): Uint8Array => {
    const pair = createECDH('prime256v1')
    const point = new Uint8Array(pair.generateKeys())
    const publicBytes = marshalPublic({ ...template, x: point.subarray(1, 33), y: point.subarray(33) })
    // What a parser sees is what the template says.
    expect(parsePublic(publicBytes)).toMatchObject({ attributes: template.attributes })
    return publicBytes
  }
})

describe('conversations', () => {
  test("another board's serial", async () => {
    const [{ machine, keys, id }, other] = [await genuine(), await genuine()]
    expect(await outcome({ machine, keys, serial: other.machine.serial }, id)).toEqual(refused('manifest.serial-mismatch'))
    expect((await deviceOf(other.id)).lastRefusal).toBeNull()
  })

  test('evidence that was relayed from another connection', async () => {
    const { machine, keys, id } = await genuine()
    expect(await outcome({ machine, keys, exporter: random(32) }, id)).toEqual(refused('credential.proof'))
    expect(await attempt({ machine, keys })).toBe('admitted')
  })

  test('a complete enrolment that was recorded, played again', async () => {
    const { machine, keys, id } = await genuine()
    const recorded: Uint8Array[] = []
    let client = ''
    const wiretap = (of: string, bytes: Uint8Array): void => {
      client = of
      recorded.push(bytes)
    }
    expect(await attempt({ machine, keys, wiretap })).toBe('admitted')
    const certificates = (await deviceOf(id)).certificates.length
    const strangers = await counted()
    const heard: BodyOf<'identity' | 'challenge' | 'refusal'>[] = []
    const connection = await connectTo(world.server.mqttPort)({
      client,
      credentials: null,
      topics: { up: `fk/1/e/${client}/up`, down: `fk/1/e/${client}/down` },
      onMessage: (bytes) => void heard.push(readMessage(bytes, { max: 1 << 20 }).envelope.body as BodyOf<'refusal'>),
      onClose: () => undefined,
    })
    for (const bytes of recorded) await connection.send(bytes)
    await until('two answers', () => heard.length >= 2)
    await connection.close()
    // The hello is as good as any; the answer is for a challenge that was spent, over a connection that is gone.
    expect(heard.map(({ type }) => type)).toEqual(['challenge', 'refusal'])
    expect(heard[1]).toMatchObject({ code: 'not-found' })
    expect(await strangers()).toMatch(/1 × enrol\.answer challenge\.unknown from /)
    expect((await deviceOf(id)).certificates.length).toBe(certificates)
  })

  test('two enrolments of one board at once: one identity', async () => {
    const { machine, keys, id } = await genuine()
    const outcomes = await Promise.all([attempt({ machine, keys }), attempt({ machine, keys })])
    expect(outcomes).toContain('admitted')
    expect(outcomes.filter((outcome) => !['admitted', 'conflict'].includes(outcome))).toEqual([])
    const device = await deviceOf(id)
    expect(device.state).toBe('enrolled')
    const agent = world.agent(machine)
    await until('the board itself comes in', () => agent.status().connected)
    await agent.stop()
  })

  test('a server that the device does not know', async () => {
    const rogue = await openWorld()
    try {
      const { machine, keys } = await genuine()
      await expect(attempt({ machine, keys, port: rogue.server.mqttPort })).rejects.toMatchObject({ reason: 'certificate.chain' })
      const { items } = await rogue.client.call('audit.list', { query: { after: 0, limit: 500 } })
      expect(items.filter(({ action }) => action.startsWith('enrol'))).toEqual([])
    } finally {
      await rogue.stop()
    }
  })

  test("a stranger who claims a live device's client id: the real session stays", async () => {
    const { machine, id } = await genuine()
    const agent = world.agent(machine)
    await until('connected', () => agent.status().connected)
    const seen: boolean[] = []
    const off = agent.onChange(({ connected }) => void seen.push(connected))
    const strangers = await counted()
    for (const username of [undefined, id]) {
      const stranger = await dial(world.server.mqttPort)
      // 4: bad user name or password (MQTT 3.1.1 §3.2.2.3).
      expect(await stranger.connect({ id, ...(username === undefined ? {} : { username, password: 'x'.repeat(86) }) })).toBe(4)
      await stranger.close()
    }
    expect(await strangers()).toMatch(/2 × device\.connect connect\.no-certificate from /)
    // Time in which a taken session would have been closed, and the agent's answer to it seen.
    await world.client.call('key.create', { body: { id: 'still-there', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'still-there' }, body: { group: 'plant' } })
    await until('the real device is served', () => agent.status().current['still-there'] === 1)
    off()
    expect(seen).not.toContain(false)
    await agent.stop()
  })
})

import assert from 'node:assert/strict'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient, Refused, Unreachable, type Call, type Client } from '@fleetkey/cli/client.ts'
import type { OperationName, ResponseOf } from '@fleetkey/protocol/admin.ts'
import type { Store } from '@fleetkey/server/flows/context.ts'
import { hasIdentity } from '@fleetkey/server/fleet/device.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { auditIsWhole, certificatesWereIntended, identitiesAreUnique, invariants, sameValues, theNextCaWasKnown } from '../invariants/invariants.ts'
import { freePort } from '../ports.ts'
import { isSettled, openBoards, provision, type Boards } from './boards.ts'
import { supervise } from './supervised.ts'

/** For each step of the path. A restart beside other work takes seconds, and the devices' pauses grow meanwhile. */
const patience = 90_000

/** How often each process was killed; the KMS process by itself. */
export interface Kills {
  readonly server: number
  readonly kms: number
  readonly boards: number
}

type Calling = <N extends OperationName>(name: N, with_?: Call<N>) => Promise<ResponseOf<N>>

/** Another operator's yes. */
const approve = async (data: string, call: Calling, id: string): Promise<void> => {
  const { token } = await call('operator.add', { body: { id: 'bob', roles: ['owner'] } })
  const bob = createClient({ ...(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; ca: string }), token })
  await bob.call('approval.grant', { params: { id } })
  bob.close()
}

/** Every device trusts what the last version of the bundle says, and both of its certificates come from the CA that signs. */
const areUnderTheNext = async (store: Store, devices: readonly string[], version: number): Promise<void> => {
  for (const id of devices) {
    const device = await store.get('device', id)
    assert.ok(hasIdentity(device) && device.state === 'enrolled', `${id} is ${String(device?.state)}`)
    assert.equal(device.trust?.version, version, `${id} has not acknowledged bundle ${version}`)
    for (const serial of [device.tlsSerial, device.ldevidSerial]) {
      const certificate = await store.get('certificate', serial)
      assert.deepEqual([certificate?.issuer, certificate?.status, certificate?.replacedAt], ['issuing-ca-2', 'valid', undefined], `${id}: ${serial}`)
    }
  }
}

/**
 * One whole rollover with one process killed at one durable step and started again: each command is repeated until it is done, as an operator would. Throws
 * when it does not complete, when a key is left that must be gone, a device is not under the next CA, or an invariant does not hold. How often each was killed.
 */
export const rollOverKilled = async (of: {
  readonly root: boolean
  /** The server's environment. */
  readonly fault: NodeJS.ProcessEnv
  /** The CA before is revoked while it signs. */
  readonly revoked?: boolean
  /** Boards of a batch that are connected meanwhile, with real agents and TPMs in software; they hang during a revocation, with a key on its way to them. */
  readonly devices?: { readonly factory: string; readonly serials: readonly [string, string]; readonly fault?: NodeJS.ProcessEnv }
}): Promise<Kills> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-rollover-'))
  const data = join(folder, 'server')
  const [mqtt, https] = [await freePort(), await freePort()]
  let kmsStarts = 0
  const server = await supervise({
    script: './server-process.ts',
    args: ['--data', data, '--mqtt-port', String(mqtt), '--https-port', String(https), '--json'],
    fault: of.fault,
    isReady: (line) => line.startsWith('{"ready":true'),
    onLine: (line) => void (kmsStarts += line.startsWith('{"kms":') ? 1 : 0),
  })
  let client: Client | undefined
  let boards: Boards | undefined
  const call: Calling = async (name, with_) => {
    for (const end = Date.now() + patience; ;) {
      try {
        client ??= createClient(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; token: string; ca: string })
        return await client.call(name, with_)
      } catch (thrown) {
        if (thrown instanceof Refused) throw thrown
        if (!(thrown instanceof Unreachable) || Date.now() > end) throw new Error(`${name}: ${String(thrown)}\n${server.errors}`, { cause: thrown })
        client?.close()
        client = undefined
        await new Promise((resolve) => void setTimeout(resolve, 50))
      }
    }
  }
  const until = async (what: string, holds: () => Promise<boolean> | boolean): Promise<void> => {
    for (const end = Date.now() + patience; !(await holds()); await new Promise((resolve) => void setTimeout(resolve, 50)))
      if (Date.now() > end)
        throw new Error(
          `within ${patience / 1000} s: ${what}\n${JSON.stringify(await call('ca.status'))}\nserver: ${server.errors}\nboards: ${boards?.process.errors ?? ''}`,
        )
  }
  const serials = of.devices?.serials ?? []
  /** The current epoch of each key is in use on all. */
  const usingNewest = async (): Promise<boolean> => {
    const keys = (await call('key.list')).items
    return keys.every(({ id, current }) => serials.every((serial) => boards?.status.get(serial)?.current[id] === current))
  }
  const connect = async ({ factory, fault = {} }: NonNullable<typeof of.devices>): Promise<void> => {
    await provision(
      factory,
      async (name, with_) =>
        await call(name, with_).catch((thrown: unknown) => {
          // Done by the process that did not live to say so.
          if (thrown instanceof Refused && thrown.code === 'conflict') return undefined
          throw thrown
        }),
    )
    const bundle = join(folder, 'bundle.json')
    writeFileSync(bundle, JSON.stringify(await call('bundle')))
    boards = await openBoards({ factory, bundle, data: join(folder, 'boards'), serials, fault })
    await until('all use their keys', async () => await usingNewest())
  }
  /** Those that are there have acknowledged the bundle as it is, and nobody is stranded. */
  const acknowledged = async (count = serials.length): Promise<void> =>
    await until(`${count} have acknowledged`, async () => {
      const { readiness } = await call('ca.status')
      return readiness.acknowledged === count && readiness.stranded === 0
    })
  try {
    if (of.devices !== undefined) await connect(of.devices)
    await call('ca.prepare', { body: { root: of.root } })
    await call('ca.distribute')
    await acknowledged()
    if (of.revoked === true) {
      if (of.devices !== undefined) {
        // Nobody answers while the next epoch is sent: it waits for all of them.
        boards?.hang(true)
        await call('key.rotate', { params: { id: 'telemetry' }, body: { waves: [1], deadline: 3_600_000 } })
        await until('it waits for all', async () => (await call('ca.blast-radius', { params: { name: 'issuing' } })).waiting === serials.length)
      }
      const revoke = { params: { name: 'issuing' }, body: { reason: 'stolen', force: true } }
      await approve(data, call, (await call('ca.revoke', revoke)).approval ?? '')
      await call('ca.revoke', revoke)
      boards?.hang(false)
    } else {
      await call('ca.activate', { body: {} })
      await acknowledged()
      await call('ca.taint', { body: { within: of.devices === undefined ? 60 : 0 } })
      await until('all have renewed', async () => (await call('ca.status')).generations[0]?.devices === 0)
      await call('ca.retire', { body: {} })
    }
    await acknowledged()
    const { generations, roots, version } = await call('ca.status')
    assert.deepEqual(
      generations.map(({ state }) => state),
      ['retired', 'active'],
    )
    // One version for each command that devices hear of: a repeated one makes no other.
    assert.equal(version, of.revoked === true ? 3 : 5)
    assert.equal(generations[0]?.revoked?.reason, of.revoked === true ? 'stolen' : undefined)
    assert.deepEqual(
      roots,
      of.root
        ? [
            { number: 1, state: 'retired' },
            { number: 2, state: 'trusted' },
          ]
        : [{ number: 1, state: 'trusted' }],
    )
    const keys = readdirSync(join(data, 'kms')).filter((name) => /^(?:root|issuing)-ca/.test(name))
    // A root that has revoked a CA goes on to say so.
    const ofRoots = of.root ? ['root-ca-2.key.cbor', ...(of.revoked === true ? ['root-ca.key.cbor'] : [])] : ['root-ca.key.cbor']
    assert.deepEqual(keys.toSorted(), ['issuing-ca-2.key.cbor', ...ofRoots])
    if (of.devices !== undefined) {
      await until('every rotation is settled', async () => await isSettled(call, serials))
      await until('all are connected, with the newest keys', async () => {
        const connected = serials.every((serial) => boards?.status.get(serial)?.connected === true)
        return connected && (await usingNewest())
      })
      await sameValues(
        (await call('key.list')).items,
        serials.map((serial) => (boards as Boards).evidence(serial)),
      )
    }
    let log = ''
    await client?.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await call('audit.key')).spki, 'base64')
    const kms = kmsStarts - server.kills - 1
    await server.stop()
    const store = await openSqliteStore(join(data, 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
    try {
      const devices = serials.map((serial) => (boards as Boards).evidence(serial))
      const evidence = { store, devices, history: boards?.history ?? [], log, auditKey }
      const hold = of.devices === undefined ? [theNextCaWasKnown, certificatesWereIntended, identitiesAreUnique, auditIsWhole] : invariants
      for (const invariant of hold) await invariant(evidence)
      await areUnderTheNext(
        store,
        devices.map(({ device }) => device),
        version,
      )
    } finally {
      await store.close()
    }
    return { server: server.kills, kms, boards: boards?.process.kills ?? 0 }
  } finally {
    client?.close()
    await boards?.process.stop()
    await server.stop()
    rmSync(folder, { recursive: true, force: true })
  }
}

import assert from 'node:assert/strict'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient, Unreachable, type Call, type Client } from '@fleetkey/cli/client.ts'
import type { OperationName, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { auditIsWhole, certificatesWereIntended, identitiesAreUnique, theNextCaWasKnown } from '../invariants/invariants.ts'
import { freePort } from '../ports.ts'
import { supervise } from './supervised.ts'

const patience = 60_000

/** Another operator's yes. */
const approve = async (data: string, call: <N extends OperationName>(name: N, with_?: Call<N>) => Promise<ResponseOf<N>>, id: string): Promise<void> => {
  const { token } = await call('operator.add', { body: { id: 'bob', roles: ['owner'] } })
  const bob = createClient({ ...(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; ca: string }), token })
  await bob.call('approval.grant', { params: { id } })
  bob.close()
}

/**
 * One whole rollover of a server that is killed at one durable step and started again: each command is repeated until it is done, as an operator would. Throws
 * when it does not complete, when a key is left that must be gone, or an invariant does not hold. How often it was killed.
 */
export const rollOverKilled = async (of: {
  readonly root: boolean
  readonly fault: NodeJS.ProcessEnv
  /** The CA before is revoked while it signs. */
  readonly revoked?: boolean
}): Promise<number> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-rollover-'))
  const data = join(folder, 'server')
  const [mqtt, https] = [await freePort(), await freePort()]
  const server = await supervise({
    script: './server-process.ts',
    args: ['--data', data, '--mqtt-port', String(mqtt), '--https-port', String(https), '--json'],
    fault: of.fault,
    isReady: (line) => line.startsWith('{"ready":true'),
    onLine: () => undefined,
  })
  let client: Client | undefined
  const call = async <N extends OperationName>(name: N, with_?: Call<N>): Promise<ResponseOf<N>> => {
    for (const end = Date.now() + patience; ;) {
      try {
        client ??= createClient(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; token: string; ca: string })
        return await client.call(name, with_)
      } catch (thrown) {
        if (!(thrown instanceof Unreachable) || Date.now() > end) throw new Error(`${name}: ${String(thrown)}\n${server.errors}`, { cause: thrown })
        client?.close()
        client = undefined
        await new Promise((resolve) => void setTimeout(resolve, 50))
      }
    }
  }
  try {
    await call('ca.prepare', { body: { root: of.root } })
    await call('ca.distribute')
    if (of.revoked === true) {
      const revoke = { params: { name: 'issuing' }, body: { reason: 'stolen', force: true } }
      await approve(data, call, (await call('ca.revoke', revoke)).approval ?? '')
      await call('ca.revoke', revoke)
    } else {
      await call('ca.activate', { body: {} })
      await call('ca.taint', { body: { within: 60 } })
      await call('ca.retire', { body: {} })
    }
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
    let log = ''
    await client?.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await call('audit.key')).spki, 'base64')
    await server.stop()
    const store = await openSqliteStore(join(data, 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
    try {
      const evidence = { store, devices: [], history: [], log, auditKey }
      for (const invariant of [theNextCaWasKnown, certificatesWereIntended, identitiesAreUnique, auditIsWhole]) await invariant(evidence)
    } finally {
      await store.close()
    }
    return server.kills
  } finally {
    client?.close()
    await server.stop()
    rmSync(folder, { recursive: true, force: true })
  }
}

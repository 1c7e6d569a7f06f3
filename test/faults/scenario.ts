import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync, existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient, Refused, Unreachable, type Call, type Client } from '@fleetkey/cli/client.ts'
import type { OperationName, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { invariants, sameValues } from '../invariants/invariants.ts'
import { freePort } from '../ports.ts'
import { isSettled, openBoards, provision, type Boards } from './boards.ts'
import { supervise } from './supervised.ts'

/** How long it took from the restart to the end. */
export interface ScenarioResult {
  readonly kills: number
  /** Ends of the KMS process that its server has outlived. */
  readonly kmsKills: number
  readonly afterRestart: number
}

const sleep = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))

const hour = 3_600_000
/**
 * How far the server's clock is ahead while devices are away: a day and a half passes, then a week. It ends a little behind the operator's, whose client takes no
 * certificate of the future.
 */
const away = { begin: -206 * hour, renewed: -172 * hour, expired: -4 * hour } as const

/** For each step of the path. A restart beside other work takes seconds, and the devices' pauses grow meanwhile. */
const patience = 90_000

/**
 * From an empty folder to a revoked device, or to devices that renewed and returned, with one process killed at one durable step and started again. Every operator's act is repeated until it is
 * done, as an operator would. Throws when it does not complete or an invariant does not hold.
 */
export const runScenario = async (of: {
  readonly factory: string
  readonly serials: readonly [string, string]
  /** They renew and return instead of being rotated and revoked. */
  readonly away?: boolean
  /** They are in a group that is served by broadcast: one leaves and returns, and the labels are made anew. */
  readonly groups?: boolean
  /** One misses five rotations and comes back. */
  readonly misses?: boolean
  readonly server?: NodeJS.ProcessEnv
  readonly boards?: NodeJS.ProcessEnv
}): Promise<ScenarioResult> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-fault-'))
  const data = join(folder, 'server')
  const clock = join(folder, 'clock')
  writeFileSync(clock, String(of.away === true ? away.begin : 0))
  const [mqtt, https] = [await freePort(), await freePort()]
  let kmsStarts = 0
  const server = await supervise({
    script: './server-process.ts',
    args: ['--data', data, '--mqtt-port', String(mqtt), '--https-port', String(https), '--json'],
    fault: of.server ?? {},
    env: { FLEETKEY_CLOCK: clock },
    isReady: (line) => line.startsWith('{"ready":true'),
    onLine: (line) => void (kmsStarts += line.startsWith('{"kms":') ? 1 : 0),
  })
  let boards: Boards | undefined
  let client: Client | undefined
  const until = async (what: string, holds: () => boolean | Promise<boolean>): Promise<void> => {
    for (const end = Date.now() + patience; ; await sleep(20)) {
      try {
        if (await holds()) return
      } catch (thrown) {
        if (!(thrown instanceof Unreachable)) throw thrown
      }
      if (Date.now() > end)
        throw new Error(
          `within ${patience / 1000} s: ${what}\nserver: ${server.errors}\nboards: ${boards?.process.errors ?? ''}\n${JSON.stringify([...(boards?.status ?? [])])}\n${JSON.stringify(await client?.call('campaign.list'))}`,
        )
    }
  }
  /** Longer than anybody here waits: a rotation that only its deadline would free is a failure. */
  const policy = { waves: [0.5, 1], deadline: 3_600_000 }
  /** Repeats while the server is away; `conflict` says that it was done before. */
  const call = async <N extends OperationName>(name: N, with_?: Call<N>): Promise<ResponseOf<N> | undefined> => {
    for (const end = Date.now() + patience; ;) {
      try {
        // The file is rewritten at each start.
        client ??= createClient(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; token: string; ca: string })
        return await client.call(name, with_)
      } catch (thrown) {
        if (thrown instanceof Refused && thrown.code === 'conflict') return undefined
        if (!(thrown instanceof Unreachable) || Date.now() > end) throw thrown
        client?.close()
        client = undefined
        await sleep(25)
      }
    }
  }
  try {
    await until('the first token', () => existsSync(join(data, 'cli.json')))
    await provision(of.factory, call)
    const bundle = join(folder, 'bundle.json')
    writeFileSync(bundle, JSON.stringify(await call('bundle')))
    boards = await openBoards({ factory: of.factory, bundle, data: join(folder, 'boards'), serials: of.serials, fault: of.boards ?? {} })
    const { status, history, evidence, powerCycle, process: boardsProcess } = boards
    const using = (key: string, epoch: number, serials: readonly string[] = of.serials): boolean =>
      serials.every((serial) => status.get(serial)?.current[key] === epoch)
    await until('both use both keys', () => using('telemetry', 1) && using('command-auth', 1))
    /** Rotated, booted anew, quarantined and back; one of the two is revoked. Who is left. */
    const rotateAndRevoke = async (): Promise<readonly string[]> => {
      const latest = async (): Promise<number> => (await call('key.show', { params: { id: 'telemetry' } }))?.latest ?? 0
      if ((await latest()) === 1) await call('key.rotate', { params: { id: 'telemetry' }, body: policy })
      await until('a rotation was started', async () => {
        // The order may have been lost with the process that took it.
        if ((await latest()) === 2) return true
        await call('key.rotate', { params: { id: 'telemetry' }, body: policy })
        return false
      })
      await until('both use epoch 2', () => using('telemetry', 2))
      await until(
        'epoch 1 is destroyed',
        async () => (await call('key.show', { params: { id: 'telemetry' } }))?.epochs.find(({ epoch }) => epoch === 1)?.state === 'destroyed',
      )
      // Power off and on: each proves its new boot before anything else is sent to it. A kill meanwhile boots them as well.
      const verdicts = async (): Promise<readonly number[]> =>
        await Promise.all(of.serials.map(async (serial) => (await call('device.show', { params: { id: serial.toLowerCase() } }))?.verdictAt ?? 0))
      const before = await verdicts()
      powerCycle()
      await until('both have attested the new boot', async () => (await verdicts()).every((at, index) => at > (before[index] ?? 0)))
      // A policy that they do not meet, and back: quarantined, then asked, then theirs again.
      const states = async (): Promise<readonly (string | undefined)[]> =>
        await Promise.all(of.serials.map(async (serial) => (await call('device.show', { params: { id: serial.toLowerCase() } }))?.state))
      await call('group.policy.set', { params: { id: 'plant' }, body: { minimumRelease: 2 } })
      await until('both are quarantined', async () => (await states()).every((state) => state === 'quarantined'))
      await call('group.policy.set', { params: { id: 'plant' }, body: { minimumRelease: 0 } })
      await until('both are back', async () => (await states()).every((state) => state === 'enrolled'))
      // I4 between two devices: afterwards only one is left. A kill may come between question and answer: then it is asked again.
      await until('both hold the same values', async () => {
        const asked = sameValues((await call('key.list'))?.items ?? [], of.serials.map(evidence)).then(
          () => true,
          (thrown: unknown) => {
            // A board that was just killed cannot answer; two values are two values.
            if (thrown instanceof assert.AssertionError) throw thrown
            return false
          },
        )
        return await Promise.race([asked, sleep(10_000).then(() => false)])
      })
      const [stays, goes] = of.serials
      const gone = goes.toLowerCase()
      await call('device.revoke', { params: { id: gone }, body: { reason: 'stolen' } })
      await until('it is revoked', async () => (await call('device.show', { params: { id: gone } }))?.state === 'revoked')
      await until('its session is closed', () => status.get(goes)?.connected === false)
      await until(
        'the other uses newer epochs',
        () => (status.get(stays)?.current['telemetry'] ?? 0) >= 3 && (status.get(stays)?.current['command-auth'] ?? 0) >= 2,
      )
      await until('every rotation is settled', async () => await isSettled(call, [stays]))
      assert.ok(status.get(goes)?.connected === false, 'the revoked device is connected')
      return [stays]
    }
    const setClock = (ahead: number): void => {
      writeFileSync(`${clock}.new`, String(ahead))
      renameSync(`${clock}.new`, clock)
    }
    /** A day and a half pass: each renews, and uses what it got. A week passes: each comes back by a fresh quote. Nobody is given more than one certificate in use. */
    const renewAndReturn = async (): Promise<readonly string[]> => {
      const views = async () => await Promise.all(of.serials.map(async (serial) => await call('device.show', { params: { id: serial.toLowerCase() } })))
      const ends = async (): Promise<readonly number[]> => (await views()).map((view) => view?.tlsNotAfter ?? 0)
      const first = await ends()
      setClock(away.renewed)
      powerCycle()
      await until('both use a renewed certificate', async () =>
        (await views()).every((view, at) => (view?.tlsNotAfter ?? 0) > (first[at] ?? 0) && view?.renewal === null && view.online),
      )
      assert.ok(
        (await views()).every((view) => view?.recovery?.begun.length === 0 && view.recovery.attempts === 0),
        'a renewal was paid for with a recovery',
      )
      const second = await ends()
      setClock(away.expired)
      powerCycle()
      await until('both are back', async () =>
        (await views()).every((view, at) => (view?.tlsNotAfter ?? 0) > (second[at] ?? 0) && view?.online === true && view.recovery?.attempts === 0),
      )
      await until('both use both keys again', () => using('telemetry', 1) && using('command-auth', 1))
      for (const view of await views()) {
        // However often it was killed meanwhile: nothing but completed recoveries counts.
        assert.deepEqual([view?.recovery?.begun.length, view?.recovery?.heldAt], [1, null], `${view?.id}: ${JSON.stringify(view?.recovery)}`)
      }
      return of.serials
    }
    /** A group of both served by broadcast; one is evicted, then the labels are over, then it is back, and both use what came under the new ones. */
    const evictAndReturn = async (): Promise<readonly string[]> => {
      const [stays, goes] = of.serials
      const [one, other] = of.serials.map((serial) => serial.toLowerCase())
      const group = { params: { id: 'cell' } }
      await call('group.create', { body: { id: 'cell' as never } })
      await call('group.policy.set', { ...group, body: { delivery: 'broadcast', generationLife: 600 } })
      await call('group.add', { ...group, body: { devices: [one, other] as never } })
      await call('key.create', { body: { id: 'site' as never, protection: 'sealed', recipientUsage: 0 } })
      await call('key.grant', { params: { id: 'site' }, body: { group: 'cell' as never } })
      await until('both use site', () => using('site', 1))
      const latest = async (): Promise<number> => (await call('key.show', { params: { id: 'site' } }))?.latest ?? 0
      await call('group.remove', { params: { id: 'cell', device: other ?? '' } }).catch((thrown: unknown) => {
        // The order may have been carried out by the process that did not live to say so.
        if (!(thrown instanceof Refused) || thrown.code !== 'not-found') throw thrown
      })
      await until('who stays uses a newer epoch', () => (status.get(stays)?.current['site'] ?? 0) >= 2)
      const evicted = status.get(stays)?.current['site'] ?? 0
      await until('who left holds none', () => status.get(goes)?.holdings.every(({ key }) => key !== 'site') === true)
      setClock(700_000)
      await call('group.add', { ...group, body: { devices: [other] as never } })
      const before = await latest()
      await until('a rotation was started', async () => {
        if ((await latest()) > before) return true
        await call('key.rotate', { params: { id: 'site' }, body: { deadline: policy.deadline } })
        return false
      })
      await until('both use it', () => of.serials.every((serial) => (status.get(serial)?.current['site'] ?? 0) > before))
      // Who was away gets what it may read by the message that was for its place: nothing from before it was back.
      assert.ok(
        status.get(goes)?.holdings.every(({ key, epoch }) => key !== 'site' || epoch >= evicted),
        'the evicted device holds an epoch from before',
      )
      await until('both have proven it', async () => {
        const now = await latest()
        const views = await Promise.all([one, other].map(async (id) => await call('device.show', { params: { id: id ?? '' } })))
        return views.every((view) => {
          const held = view?.holdings.filter(({ key, stage }) => key === 'site' && (stage === 'installed' || stage === 'active')) ?? []
          // Older epochs may be read no more: each erasure is stated.
          return held.length === 1 && held[0]?.epoch === now && held[0].stage === 'active'
        })
      })
      assert.ok(((await call('group.show', group))?.shards[0]?.generation ?? 0) >= 2, 'the labels were not made anew')
      return of.serials
    }
    /** One is without power during five rotations; the other goes on, then both use and have proven the newest, and nothing older is left. */
    const missAndReturn = async (): Promise<readonly string[]> => {
      const [stays, misses] = of.serials
      const latest = async (): Promise<number> => (await call('key.show', { params: { id: 'telemetry' } }))?.latest ?? 0
      const current = async (): Promise<number> => (await call('key.show', { params: { id: 'telemetry' } }))?.current ?? 0
      boardsProcess.write(JSON.stringify({ id: 0, do: 'off', serials: [misses] }))
      for (let epoch = 2; epoch <= 6; epoch++) {
        await until(`rotation ${epoch - 1} was started`, async () => {
          if ((await latest()) === epoch) return true
          await call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 300, successThreshold: 0, errorThreshold: 1 } })
          return false
        })
        await until(`epoch ${epoch} is in use`, async () => (await current()) === epoch)
      }
      await until('who stayed uses it', () => using('telemetry', 6, [stays]))
      boardsProcess.write(JSON.stringify({ id: 0, do: 'on', serials: [misses] }))
      await until('both use it', () => using('telemetry', 6))
      await until(
        'every rotation is over',
        async () => (await call('campaign.list'))?.items.every(({ state }) => state === 'done' || state === 'aborted') === true,
      )
      await until('both have proven it, and what they erased', async () => {
        const views = await Promise.all(of.serials.map(async (serial) => await call('device.show', { params: { id: serial.toLowerCase() } })))
        return views.every((view) =>
          view?.holdings.every(
            ({ key, epoch, stage }) => key !== 'telemetry' || (epoch === 6 ? stage === 'active' : stage !== 'installed' && stage !== 'active'),
          ),
        )
      })
      return of.serials
    }
    const left =
      of.misses === true
        ? await missAndReturn()
        : of.groups === true
          ? await evictAndReturn()
          : of.away === true
            ? await renewAndReturn()
            : await rotateAndRevoke()
    const ended = Date.now()

    // The evidence, at rest.
    let log = ''
    await client?.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await call('audit.key'))?.spki ?? '', 'base64')
    const afterRestart = Math.max(server.kills > 0 ? ended - server.restartedAt : 0, boardsProcess.kills > 0 ? ended - boardsProcess.restartedAt : 0)
    const kills = server.kills + boardsProcess.kills
    await server.stop()
    const store = await openSqliteStore(join(data, 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
    try {
      for (const invariant of invariants) await invariant({ store, devices: left.map(evidence), history, log, auditKey })
    } finally {
      await store.close()
    }
    return { kills, kmsKills: kmsStarts - server.kills - 1, afterRestart }
  } finally {
    client?.close()
    await boards?.process.stop()
    await server.stop()
    rmSync(folder, { recursive: true, force: true })
  }
}

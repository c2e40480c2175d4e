"""A routing view as a mapped class of SQLAlchemy, and `search` as a table."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from embedline.client.integrations.sqlalchemy import PipelineView, ReadOnlyView, search
from support import create_pages, create_pipeline, scalar, settle


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class PageChunk(PipelineView, Base):
    __tablename__ = "page_embedding"
    __pipeline__ = "page"
    id: Mapped[int]
    title: Mapped[str]
    views: Mapped[int]


class HalfChunk(PipelineView, Base):
    __tablename__ = "half_embedding"
    __pipeline__ = "half"
    __column_type__ = "halfvec"
    __distance__ = "inner_product"
    id: Mapped[int]


@pytest.fixture(scope="module")
def engine(module_database: psycopg.Connection) -> Iterator[sa.Engine]:
    """An engine for a database with two pipelines over 300 pages, one with an index."""
    connection = module_database
    create_pages(connection, 300)
    create_pipeline(connection, keyword="english")
    create_pages(connection, 20, "half")
    create_pipeline(connection, "half", "half", column_type="halfvec", distance="inner_product")
    settle(connection)
    connection.execute(scalar(connection, "SELECT embedline.index_statement('page')"))
    connection.execute("ANALYZE")
    info = connection.info
    engine = sa.create_engine(
        sa.URL.create("postgresql+psycopg", info.user, info.password, info.host, info.port, info.dbname)
    )
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[Session]:
    """A session that is rolled back."""
    with Session(engine) as session:
        yield session


def test_the_nearest_chunks_come_with_the_columns_of_their_rows(session: Session) -> None:
    nearest = sa.select(PageChunk).order_by(PageChunk.embedding.nearest("violins")).limit(3)
    found = session.scalars(nearest).all()
    assert [chunk.chunk.split()[-1] for chunk in found] == ["violins"] * 3
    assert all(chunk.title == f"Title {chunk.id}" for chunk in found)
    assert "embedding" not in vars(found[0])
    assert found[0].embedding.startswith("[")
    filtered = nearest.where(PageChunk.title == "Title 7", PageChunk.views == 0)
    assert [chunk.id for chunk in session.scalars(filtered)] == [7]


def test_the_nearest_chunks_are_those_of_search(session: Session) -> None:
    found = search("page", "mountains", k=5, per_document=True, tenant=None)
    rows = session.execute(
        sa.select(Page.title, found.c.score)
        .join(found, found.c.key == sa.cast(Page.id, sa.Text))
        .order_by(found.c.score.desc(), Page.id)
    ).all()
    distance = PageChunk.embedding.nearest("mountains")
    ranked = session.execute(sa.select(PageChunk.title, 1 - distance).order_by(distance, PageChunk.id).limit(5)).all()
    assert len(rows) == 5
    assert [score for _, score in rows] == pytest.approx([score for _, score in ranked], abs=1e-5)
    with pytest.raises(TypeError, match="has no argument pipeline_name"):
        search("page", "mountains", pipeline_name="other")


def test_search_ranks_by_words_and_filters(session: Session) -> None:
    found = search("page", "number 17", k=1, mode="keyword", filter="id > 9")
    assert session.execute(sa.select(found.c.key, found.c.semantic_rank, found.c.keyword_rank)).all() == [
        ("17", None, 1)
    ]
    both = search("page", "number 17", mode="hybrid", semantic_weight=0.5, keyword_weight=2.0)
    ranks = session.execute(sa.select(both.c.semantic_rank, both.c.keyword_rank)).all()
    assert all(any(pair) for pair in ranks)


def test_nearest_uses_the_index(session: Session) -> None:
    # So few rows are sorted in less time. Where the form of the query kept the index out, a sort would stand in the plan.
    session.execute(sa.text("SET LOCAL enable_sort = off"))
    nearest = sa.select(PageChunk).order_by(PageChunk.embedding.nearest("violins")).limit(3)
    compiled = nearest.compile(dialect=session.get_bind().dialect)
    plan = session.connection().exec_driver_sql(f"EXPLAIN {compiled}", compiled.params).scalars().all()
    assert any("Index Scan using page_v1_embedding_idx" in line for line in plan), "\n".join(plan)
    assert not any("Sort" in line for line in plan), "\n".join(plan)


def test_a_pipeline_of_another_type_and_distance_is_ranked_by_its_own(session: Session) -> None:
    nearest = sa.select(HalfChunk.chunk).order_by(HalfChunk.embedding.nearest("violins")).limit(1)
    assert "<#>" in str(nearest)
    assert session.scalars(nearest).one().endswith("violins")


def test_a_text_is_never_taken_for_sql(session: Session) -> None:
    hostile = "'); DROP TABLE page; -- %s :x violins"
    assert session.scalars(sa.select(PageChunk.id).order_by(PageChunk.embedding.nearest(hostile)).limit(1)).all()
    assert session.execute(sa.select(search("page", hostile, k=1).c.key)).all()
    assert session.scalar(sa.select(sa.func.count()).select_from(Page)) == 300


def test_the_class_is_read_only(session: Session) -> None:
    session.add(PageChunk(chunk_id=1, chunk_seq=0, chunk_start=0, chunk_end=0, chunk="", id=1, title="", views=0))
    with pytest.raises(ReadOnlyView, match="page_embedding is read only"):
        session.flush()
    session.rollback()
    for change in ("title", None):
        chunk = session.scalars(sa.select(PageChunk).limit(1)).one()
        if change is None:
            session.delete(chunk)
        else:
            setattr(chunk, change, "other")
        with pytest.raises(ReadOnlyView):
            session.flush()
        session.rollback()


def test_create_all_makes_no_table_in_place_of_the_view() -> None:
    assert set(Base.metadata.tables) == {"page"}
    with pytest.raises(TypeError, match="must stand before the declarative base"):
        type("Wrong", (Base, PipelineView), {"__tablename__": "wrong_embedding", "__pipeline__": "wrong"})
